"""WKV recurrences: state in, state out, gradients through both."""

from infctx.ops.backends import BACKENDS
from infctx.ops.wkv import wkv4, wkv6, wkv7

__all__ = ["BACKENDS", "wkv4", "wkv6", "wkv7"]
