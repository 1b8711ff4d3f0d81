"""The model around the mixers: embedding, blocks, head. Parameter names are those of the published checkpoints.

B rows, T tokens, C channels. A new architecture is a file with its mixers and a row in MIXERS.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models import goldfinch, rwkv4, rwkv5, rwkv6, rwkv7
from infctx.models.layers import Shared, Split, linear, pack_sequences
from infctx.state import SHIFT_STATE, TIME_STATE, BlockState, KeyMemory, Relay, State

COMPILED = ("auto", "cpu", "cuda")  # kernels with which the neighbours of the recurrence are compiled too
Mixer = Callable[[ModelConfig, int], nn.Module]
_RWKV5: tuple[Mixer, Mixer] = (rwkv5.TimeMix, rwkv5.ChannelMix)
MIXERS: dict[str, tuple[Mixer, Mixer]] = {
    "rwkv4": (rwkv4.TimeMix, rwkv4.ChannelMix),
    **{f"rwkv5{preview}": _RWKV5 for preview in ("", ".0", ".0r2", ".1", ".1r2")},
    "rwkv6": (rwkv6.TimeMix, rwkv6.ChannelMix),
    "rwkv7": (rwkv7.TimeMix, rwkv7.ChannelMix),
    "rwkv7a": (rwkv7.TimeMix, rwkv7.DeepEmbedMix),
    "goldfinch": (goldfinch.time_mix, goldfinch.ChannelMix),
}


class Block(nn.Module):
    """One layer: x += att(ln1(x)), then x += ffn(ln2(x)); the first one also holds the norm of the embedding."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        time_mix, channel_mix = MIXERS[config.arch]
        self.ln0 = nn.LayerNorm(config.n_embd) if layer == 0 else None
        self.ln1, self.ln2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.att, self.ffn = time_mix(config, layer), channel_mix(config, layer)

    def forward(self, x: Tensor, shared: Shared, state: BlockState) -> tuple[Tensor, Shared, BlockState]:
        """Args: x (B, T, C). Returns: x, what later layers share, and the state after the last token."""
        mixed, shared, state = self.att(self.ln1(x), shared, state)
        x = x + mixed
        mixed, state = self.ffn(self.ln2(x), shared, state)
        return x + mixed, shared, state


def begun(block: nn.Module, zeros: Tensor) -> BlockState:
    """The state of a layer before the first token. Args: zeros (N, C)."""
    att, ffn = block.att, block.ffn
    state = BlockState(zeros.clone(), zeros.clone(), att.initial_wkv(zeros))  # type: ignore[operator,union-attr]
    learnt = [getattr(mixer, name, None) for mixer, name in ((att, SHIFT_STATE), (ffn, SHIFT_STATE), (att, TIME_STATE))]
    rows = (
        x if p is None else _sums(p.to(x.dtype)).expand(len(zeros), *p.shape)
        for x, p in zip(state, learnt, strict=True)
    )  # fmt: skip
    return BlockState(*rows)


def _sums(p: Tensor) -> Tensor:
    """RWKV-4's denominators are sums of exponentials: learning must not take them below 0."""
    return torch.cat([p[:1], p[1:2].clamp(min=0), p[2:]]) if p.dim() == 2 else p


class RWKV(nn.Module):
    """A recurrent language model: state in, state out, for one token or a million.

    Args:
        config: its sizes.
        kernel: backend of the recurrence, a key of `ops.BACKENDS`, or auto.
    """

    def __init__(self, config: ModelConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.config, self.kernel = config, kernel
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = linear(config.n_embd, config.vocab_size)
        if config.n_gold:
            rank = config.ranks["compress"]
            self.w_kv_cache_a = linear(config.n_embd, rank)
            self.w_kv_cache_b = linear(config.n_embd + rank, config.n_embd)

    def forward(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Predict the token after each one.

        Args:
            tokens: (B, T) int64.
            state: of B rows, or of N sequences with cu_seqlens; None is the beginning of a document.
            cu_seqlens: (N + 1,) int32: B is 1 and `tokens` holds N sequences end to end.
        Returns: logits (B, T, vocab) and the state after the last tokens.
        Raises: ValueError for a state of another number of sequences.
        """
        x, state = self.features(tokens, state, cu_seqlens)
        return self.head(x), state

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        split: Split | None = None,
        relay: Relay | None = None,
    ) -> tuple[Tensor, State]:
        """As `forward`, without the head: (B, T, C), so that a loss may project to the vocabulary piece by piece.

        Args:
            split: None if the tokens are all there are, else how other ranks' are reached.
            relay: where the states of the layers come from and go to, one by one; None: `state` holds them.
        """
        n = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
        state = state or self.initial_state(n)
        if relay is None and len(state.blocks[0].att_shift) != n:
            raise ValueError(f"state holds {len(state.blocks[0].att_shift)} sequences, tokens are {n}")
        packing = None if cu_seqlens is None else pack_sequences(cu_seqlens, tokens.shape[1])
        x, after = self.blocks[0].ln0(self.emb(tokens)), []  # type: ignore[operator]
        form = "auto" if self.kernel.split("-")[0] in COMPILED else "plain"
        shared = Shared(self.kernel, form, tokens, x, packing, split=split)
        for layer, block in enumerate(self.blocks):
            if self.config.n_gold and layer == self.config.n_layer - self.config.n_gold:
                memory = relay.remembered() if relay else state.memory
                shared = goldfinch.token_cat(self, x, shared, memory or self.empty_memory(n))
                if relay:
                    relay.remember(shared.memory)  # type: ignore[arg-type]
            x, shared, block_state = block(x, shared, relay.before(layer) if relay else state.blocks[layer])
            after.append(block_state)
            if relay:
                relay.after(layer, block_state)
        return self.ln_out(x), State(tuple(after), shared.memory)

    def initial_state(self, n: int) -> State:
        """The state of n sequences before their first token: nothing, or what was learnt."""
        weight = self.emb.weight
        zeros = weight.new_zeros(n, self.config.n_embd, dtype=torch.promote_types(weight.dtype, torch.float32))
        blocks = tuple(begun(block, zeros) for block in self.blocks)
        return State(blocks, self.empty_memory(n) if self.config.n_gold else None)

    def add_states(self, names: Iterable[str]) -> None:
        """Make parts of the initial state parameters: zeros.

        Args: names: blocks.N.att.time_state, blocks.N.att.shift_state, blocks.N.ffn.shift_state.
        Raises: ValueError for a name that stands for no part of it.
        """
        like = self.initial_state(1)
        places = {
            f"blocks.{i}.{mixer}.{part}": (getattr(self.blocks[i], mixer), part, x)
            for i, block in enumerate(like.blocks)
            for mixer, part, x in (("att", TIME_STATE, block.wkv), ("att", SHIFT_STATE, block.att_shift),
                                   ("ffn", SHIFT_STATE, block.ffn_shift))
            if x.numel()
        }  # fmt: skip
        for name in names:
            if name not in places:
                raise ValueError(f"{name}: a {self.config.arch} model of these sizes has no such state")
            mixer, part, x = places[name]
            mixer.register_parameter(part, nn.Parameter(torch.zeros_like(x[0])))

    def empty_memory(self, n: int) -> KeyMemory:
        """What the attention of n sequences remembers before their first token: nothing."""
        none = torch.zeros(n + 1, dtype=torch.int32, device=self.emb.weight.device)
        return KeyMemory(none[:0], self.emb.weight.new_zeros(0, self.config.ranks["compress"]), none)

    @torch.no_grad()
    def reset(self) -> None:
        """Official initial values, drawn from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, module in self.named_modules():
            if name.endswith((".att", ".ffn")):
                module.reset()  # type: ignore[operator]
        for name, module in self.named_modules():
            if name.startswith("w_kv_cache"):
                nn.init.orthogonal_(module.weight)  # type: ignore[arg-type]
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
