"""The portable backend: tiles of tokens as batched tensor operations; runs wherever torch runs, needs no compiler."""

from infctx.ops.chunked4 import wkv4_backward, wkv4_forward
from infctx.ops.chunked6 import wkv6_backward, wkv6_forward
from infctx.ops.chunked7 import wkv7_backward, wkv7_forward

__all__ = ["wkv4_backward", "wkv4_forward", "wkv6_backward", "wkv6_forward", "wkv7_backward", "wkv7_forward"]
