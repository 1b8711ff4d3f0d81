"""What a model is made of: sizes and ranks, given by hand, by a published size, or read from the shapes of weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Rank(NamedTuple):
    """The size of a low-rank part: where it shows in the weights, and what a new model of C channels gets."""

    tensor: str  # the end of the name of a tensor
    axis: int
    rule: Callable[[int], int]


class Architecture(NamedTuple):
    """What is special about the sizes of an architecture."""

    ranks: dict[str, Rank]
    ffn: float  # channels inside channel mixing over n_embd, rounded down to a multiple of 32
    heads: str | None = None  # a tensor of layer 0 with a row per head


def _by_root(c: float) -> Callable[[int], int]:
    return lambda n_embd: max(32, round(c * n_embd**0.5 / 32) * 32)


_DDLERP = {
    "mix": Rank("att.time_maa_w2", 1, lambda c: 64 if c >= 4096 else 32),
    "decay": Rank("att.time_decay_w1", 1, lambda c: 128 if c >= 4096 else 64),
}
_DELTA = {name: Rank(f"att.{name}1", 1, _by_root(c)) for name, c in {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}.items()}
_GOLD = {
    "mix": Rank("att.time_maa_w2", 1, lambda c: 32),
    "decay": Rank("att.time_decay_w1", 1, lambda c: 64),
    "value2": Rank("att.time_value2_w1", 1, lambda c: 64),
    "query": Rank("att.time_maa_q_w1", 1, lambda c: 32),
    "keyvalue": Rank("att.time_maa_kv_w2", 1, lambda c: 32),
    "expand": Rank("att.time_key_w1", 1, lambda c: max(c // 16, 64)),
    "compress": Rank("w_kv_cache_a.weight", 0, lambda c: max(1, c // 16)),
}
ARCHITECTURES = {
    "rwkv4": Architecture({}, 4),
    "rwkv5.0": Architecture({}, 4, "att.time_decay"),
    "rwkv5.1": Architecture({}, 4, "att.time_decay"),
    "rwkv5.0r2": Architecture({}, 4, "att.time_decay"),
    "rwkv5.1r2": Architecture({}, 4, "att.time_decay"),
    "rwkv5": Architecture({}, 3.5, "att.time_faaaa"),
    "rwkv6": Architecture(_DDLERP, 3.5, "att.time_faaaa"),
    "rwkv7": Architecture(_DELTA, 4, "att.r_k"),
    "rwkv7a": Architecture({**_DELTA, "embed": Rank("ffn.s1", 1, lambda c: 32)}, 4, "att.r_k"),
    "goldfinch": Architecture(_GOLD, 3.5, "att.time_faaaa"),
}
ALIASES = {"rwkv5.2": "rwkv5"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model.

    Args:
        arch: architecture: rwkv4, rwkv5 (Eagle, 5.2; previews rwkv5.0, rwkv5.1, and with r2 where the bonus is kept as
            it is), rwkv6, rwkv7, rwkv7a (DeepEmbed), goldfinch.
        n_layer: layers.
        n_embd: channels C of the residual stream.
        vocab_size: token ids.
        head_size: channels N of a head; divides n_embd. RWKV-4 has no heads: its is always 1.
        dim_ffn: channels inside channel mixing; null: the architecture's own, 3.5 or 4 n_embd.
        ranks: ranks of the low-rank parts by name (rwkv6: mix, decay; rwkv7: w decay, a in-context rate, v value
            residual, g gate; see ARCHITECTURES); what is missing gets the official rule for new models.
        n_gold: goldfinch: attention layers at the top; null: the upper third.
    """

    arch: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int = 64
    dim_ffn: int | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    n_gold: int | None = None

    def __post_init__(self) -> None:
        self._set("arch", ALIASES.get(self.arch, self.arch))
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch {self.arch!r} is not known; choose one of: {', '.join(ARCHITECTURES)}")
        row = ARCHITECTURES[self.arch]
        if row.heads is None:
            self._set("head_size", 1)
        self._set("ranks", self.ranks or {})
        for name in ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn"):
            value = getattr(self, name)
            if not (value is None and name == "dim_ffn") and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if min(self.ranks.values(), default=1) < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of head_size {self.head_size}")
        if unknown := set(self.ranks) - set(row.ranks):
            raise ValueError(f"ranks: {sorted(unknown)} not known for {self.arch}; it has {sorted(row.ranks)}")
        self._set("ranks", {name: rank.rule(self.n_embd) for name, rank in row.ranks.items()} | self.ranks)
        self._set("dim_ffn", self.dim_ffn or max(32, int(row.ffn * self.n_embd) // 32 * 32))
        self._check_gold()

    def _check_gold(self) -> None:
        if self.arch != "goldfinch":
            if self.n_gold is not None:
                raise ValueError(f"n_gold is for goldfinch; {self.arch} has no attention layers")
            return
        self._set("n_gold", self.n_layer - self.n_layer * 2 // 3 if self.n_gold is None else self.n_gold)
        if not 0 < (self.n_gold or 0) < self.n_layer:
            raise ValueError(
                f"goldfinch needs a layer of each kind: n_layer {self.n_layer}, of which n_gold {self.n_gold}"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Any]) -> "ModelConfig":
        """Read architecture, sizes and ranks from the names and shapes of tensors, in whatever order they come.

        Raises: ValueError if they are not a whole model of an architecture that is known.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        arch = detect(shapes)
        layers = {int(part) for name in shapes if name.startswith("blocks.") and (part := name.split(".")[1]).isdigit()}
        if layers != set(range(len(layers))):
            raise ValueError(f"layers {sorted(set(range(max(layers))) - layers)} are missing: is the file whole?")
        try:
            return cls._measure(arch, len(layers), shapes)
        except KeyError as error:
            raise ValueError(f"not a whole {arch} model: tensor {error} is missing") from None
        except (IndexError, TypeError, ZeroDivisionError):
            raise ValueError(f"not a whole {arch} model: a tensor that tells its sizes is misshapen") from None

    @classmethod
    def _measure(cls, arch: str, n_layer: int, shapes: Shapes) -> "ModelConfig":
        row = ARCHITECTURES[arch]
        if len(shapes["emb.weight"]) != 2:
            raise ValueError(f"emb.weight is {shapes['emb.weight']}, expected (vocabulary, channels)")
        vocab_size, n_embd = shapes["emb.weight"]
        heads = shapes[f"blocks.0.{row.heads}"][0] if row.heads else n_embd
        ranks: dict[str, int] = {}
        for name, rank in row.ranks.items():
            # Layer 0 may lack what it never uses, so a rank comes from the last layer that has it.
            found = [shape for i in range(n_layer) if (shape := shapes.get(f"blocks.{i}.{rank.tensor}"))]
            found += [shapes[rank.tensor]] if rank.tensor in shapes else []
            ranks |= {name: found[-1][rank.axis]} if found else {}
        gold = [i for i in range(n_layer) if f"blocks.{i}.att.time_maa_q_w1" in shapes]
        return cls(
            arch, n_layer, n_embd, vocab_size, n_embd // heads, shapes["blocks.0.ffn.key.weight"][0], ranks,
            len(gold) if arch == "goldfinch" else None,
        )  # fmt: skip


# The first row whose every tensor is there decides; the more special stand first. "!" marks what is refused, and why.
SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("!RWKV-8 (ROSA): its suffix automaton is no recurrent state and has no gradient", ("rosa.",)),
    ("!RWKV-8 (DeepEmbed on the feed-forward output): no final weights are published", ("ffn.enn.weight",)),
    ("!RWKV-7b (DEA): its attention keeps keys and values of every token", ("qkv.k_emb.weight",)),
    ("rwkv7a", ("att.r_k", "ffn.s_emb.weight")),
    ("rwkv7", ("att.r_k",)),
    ("goldfinch", ("w_kv_cache_a.weight", "att.time_value2_w1")),
    ("!a GoldFinch whose lower layers are not Finch-C2", ("w_kv_cache_a.weight",)),
    ("!RWKV-6a (gate of low rank)", ("att.time_maa_x", "att.gate_w1")),
    ("!RWKV-6b or 6c (no gate)", ("att.time_maa_x", "att.time_maa_rkvw_w1")),
    ("rwkv6", ("att.time_maa_x",)),
    ("rwkv5", ("att.ln_x.weight", "att.gate.weight", "att.time_faaaa")),
    ("rwkv5.1", ("att.ln_x.weight", "att.gate.weight")),
    ("rwkv5.0r2", ("att.ln_x.weight", "att.time_faaaa")),
    ("rwkv5.0", ("att.ln_x.weight",)),
    ("!RWKV-4a (tiny attention)", ("att.time_mix_qq",)),
    ("rwkv4", ("att.time_decay", "att.time_first")),
)


def detect(shapes: Shapes) -> str:
    """The architecture whose tensors these are, in whatever order. Raises: ValueError if there is none."""
    everything = "\n".join(shapes)
    for arch, marks in SIGNATURES:
        if all(mark in everything for mark in marks):
            if arch.startswith("!"):
                raise ValueError(f"these are weights of {arch[1:]}; infctx reads: {', '.join(ARCHITECTURES)}")
            decays = [shape for name, shape in shapes.items() if name.endswith("att.time_decay")]
            one_per_head = arch == "rwkv5" and all(math.prod(shape) == shape[0] for shape in decays if shape)
            return "rwkv5.1r2" if one_per_head else arch
    found = ", ".join(list(shapes)[:3]) or "none at all"
    raise ValueError(f"no RWKV model: expected tensors like emb.weight and blocks.0.att.time_decay, found {found}")
