"""The model around the mixers: embedding, blocks, head. Parameter names are those of the published checkpoints.

B rows, T tokens, C channels. A new architecture is a file with its mixers and a row in MIXERS.
"""

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models import rwkv7
from infctx.models.layers import Shared, pack_sequences
from infctx.state import BlockState, State

MIXERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {"rwkv7": (rwkv7.TimeMix, rwkv7.ChannelMix)}


class Block(nn.Module):
    """One layer: x += att(ln1(x)), then x += ffn(ln2(x)); the first one also normalises the embedding."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        time_mix, channel_mix = MIXERS[config.arch]
        self.ln0 = nn.LayerNorm(config.n_embd) if layer == 0 else None
        self.ln1, self.ln2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.att, self.ffn = time_mix(config, layer), channel_mix(config, layer)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C). Returns: x, what later layers share, and the state after the last token."""
        if self.ln0 is not None:
            x = self.ln0(x)
        mixed, shared, state = self.att(self.ln1(x), shared, state)
        x = x + mixed
        mixed, state = self.ffn(self.ln2(x), shared, state)
        return x + mixed, shared, state


class RWKV(nn.Module):
    """A recurrent language model: state in, state out, for one token or a million.

    Args:
        config: its sizes.
        kernel: backend of the recurrence: auto, reference or chunked.
    """

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.config, self.kernel = config, kernel
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Predict the token after each one.

        Args:
            tokens: (B, T) int64.
            state: of B rows, or of N sequences with cu_seqlens; None is the beginning of a document.
            cu_seqlens: (N + 1,) int32: B is 1 and `tokens` holds N sequences end to end.
        Returns: logits (B, T, vocab) and the state after the last tokens.
        """
        x, state = self.features(tokens, state, cu_seqlens)
        return self.head(x), state

    def features(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `forward`, without the head: (B, T, C), so that a loss may project to the vocabulary piece by piece."""
        n = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
        state = state or self.initial_state(n)
        packing = None if cu_seqlens is None else pack_sequences(cu_seqlens, tokens.shape[1])
        shared = Shared(self.kernel, packing)
        x, after = self.emb(tokens), []
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x, shared, block_state = block(x, shared, before)
            after.append(block_state)
        return self.ln_out(x), State(tuple(after))

    def initial_state(self, n: int) -> State:
        """The state of n sequences before their first token: zeros."""
        weight, c, size = self.emb.weight, self.config.n_embd, self.config.head_size
        zeros = weight.new_zeros(n, c, dtype=torch.promote_types(weight.dtype, torch.float32))
        matrix = zeros.new_zeros(n, c // size, size, size)
        return State((BlockState(zeros, zeros, matrix),) * self.config.n_layer)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values, drawn from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, module in self.named_modules():
            if name.endswith((".att", ".ffn")):
                module.reset()  # type: ignore[operator]
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, self.config.vocab_size / self.config.n_embd) ** 0.5)


def init_model(config: ModelConfig, seed: int = 0, kernel: str = "auto") -> RWKV:
    """A new float32 model with the official initial values of its architecture, the same for the same seed."""
    with torch.device("meta"):
        model = RWKV(config, kernel)
    model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset()
    return model
