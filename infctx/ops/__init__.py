"""WKV recurrences: state in, state out, gradients through both."""

from infctx.ops.wkv import BACKENDS, wkv7

__all__ = ["BACKENDS", "wkv7"]
