"""Token losses, summed. The projection to the vocabulary and its gradient go tile by tile, in one pass.

M tokens, C channels, V vocabulary. (M, V) never exists whole: a tile of TILE tokens does, its gradient taken at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.state import computing_dtype

IGNORED = -100  # the target of a token that is not to be learnt
TILE = 512  # tokens: 134 MB of float32 logits at a vocabulary of 65,536


def token_losses(x: Tensor, weight: Tensor, targets: Tensor, l2_penalty: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(x weight^T), summed over the supervised tokens.

    Args:
        x: (M, C) what the head sees; weight: (V, C) the head's; targets: (M,) int64, -100 where nothing is learnt.
        l2_penalty: adds l2_penalty / 2 * (largest logit)^2 for each supervised token; RWKV-LM's L2Wrap is 1e-4.
    Returns:
        the sum with the penalty, a scalar in float32 (float64 for float64), and (M,) the losses in nats without it,
        0 where ignored and not differentiable.
    """
    return _TiledLoss.apply(x, weight, targets, l2_penalty)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, l2_penalty):  # type: ignore[no-untyped-def]
        dtype = computing_dtype(x)
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            dw = weight.new_zeros(weight.shape, dtype=wide) if ctx.needs_input_grad[1] else None
            total, losses = x.new_zeros((), dtype=wide), x.new_empty(len(x), dtype=wide)
            for begin in range(0, len(x), TILE):
                part = slice(begin, begin + TILE)
                x_part = x[part].to(dtype)
                losses[part], penalty, d = _tile(F.linear(x_part, w).to(wide), targets[part], l2_penalty)
                total += losses[part].sum() + penalty
                if dx is not None:
                    dx[part] = d.to(dtype) @ w
                if dw is not None:
                    dw += d.to(dtype).mT @ x_part
        ctx.grads = dx, dw if dw is None else dw.to(weight.dtype)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx, dtotal, _):  # type: ignore[no-untyped-def]
        (dx, dw), ctx.grads = ctx.grads, None
        return *(g if g is None else g.mul_(dtotal) for g in (dx, dw)), None, None


def _tile(logits: Tensor, targets: Tensor, l2_penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (M,), the summed penalty, and the gradient (M, V) of both, of one tile of logits."""
    learnt = targets != IGNORED
    index = targets.clamp(min=0).unsqueeze(1)
    log_p = logits.log_softmax(-1)
    losses = torch.where(learnt, -log_p.gather(1, index).squeeze(1), 0.0)
    d = log_p.exp_()
    d.scatter_add_(1, index, torch.full_like(index, -1, dtype=d.dtype))
    penalty = logits.new_zeros(())
    if l2_penalty:
        top, place = logits.max(-1, keepdim=True)
        d.scatter_add_(1, place, l2_penalty * top)
        penalty = torch.where(learnt, 0.5 * l2_penalty * top.squeeze(1) ** 2, 0.0).sum()
    return losses, penalty, d.masked_fill_(~learnt.unsqueeze(1), 0.0)
