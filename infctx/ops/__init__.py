"""WKV recurrences: state in, state out, gradients through both."""

from infctx.ops.wkv import BACKENDS, wkv4, wkv6, wkv7

__all__ = ["BACKENDS", "wkv4", "wkv6", "wkv7"]
