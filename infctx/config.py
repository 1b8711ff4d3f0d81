"""What a model is made of: sizes and ranks, given by hand or read from the shapes of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """One row per architecture: what its tensors tell, and what a new model of it gets where nothing is said."""

    marker: str  # a tensor that every layer of this architecture has, and no other does; (H, N)
    ranks: dict[str, tuple[str, float]]  # rank -> a tensor whose second axis it is, and c of the official rule


ARCHITECTURES = {
    "rwkv7": Architecture(
        "att.r_k", {"w": ("att.w1", 2.5), "a": ("att.a1", 2.5), "v": ("att.v1", 1.7), "g": ("att.g1", 5.0)}
    ),
}
# Told apart only to say so: markers of architectures that are not read yet, the most special first.
FOREIGN = {
    "time_maa_v_cache": "GoldFinch",
    "att.time_maa_x": "RWKV-6",
    "att.ln_x.weight": "RWKV-5",
    "att.time_decay": "RWKV-4",
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model.

    Args:
        arch: architecture: rwkv7.
        n_layer: layers.
        n_embd: channels C of the residual stream.
        vocab_size: token ids.
        head_size: channels N of a head; divides n_embd.
        dim_ffn: channels inside channel mixing; null: 4 n_embd.
        ranks: ranks of the low-rank parts by name (rwkv7: w decay, a in-context rate, v value residual, g gate);
            what is missing gets the official rule for new models.
    """

    arch: str
    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int = 64
    dim_ffn: int | None = None
    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch {self.arch!r} is not known; choose one of: {', '.join(ARCHITECTURES)}")
        for name in ("n_layer", "n_embd", "vocab_size", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.ranks.values(), default=1) < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of head_size {self.head_size}")
        rules = ARCHITECTURES[self.arch].ranks
        if unknown := set(self.ranks) - set(rules):
            raise ValueError(f"ranks: {sorted(unknown)} not known for {self.arch}; it has {sorted(rules)}")
        default = {name: max(32, round(c * self.n_embd**0.5 / 32) * 32) for name, (_, c) in rules.items()}
        object.__setattr__(self, "ranks", {**default, **self.ranks})
        object.__setattr__(self, "dim_ffn", self.dim_ffn or 4 * self.n_embd)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Any]) -> "ModelConfig":
        """Read architecture, sizes and ranks from the names and shapes of tensors, in whatever order they come.

        Raises: ValueError if they are not a whole model of an architecture that is known.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        arch = _detect(shapes)
        row = ARCHITECTURES[arch]
        layers = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
        if layers != set(range(len(layers))):
            raise ValueError(f"layers {sorted(set(range(max(layers))) - layers)} are missing: is the file whole?")
        try:
            head_size = shapes[f"blocks.0.{row.marker}"][1]
            vocab_size, n_embd = shapes["emb.weight"]
            dim_ffn = shapes["blocks.0.ffn.key.weight"][0]
            # Layer 0 may lack what it never uses, so ranks come from the last layer that has them.
            ranks: dict[str, int] = {}
            for rank, (name, _) in row.ranks.items():
                found = [shape for i in sorted(layers) if (shape := shapes.get(f"blocks.{i}.{name}"))]
                ranks |= {rank: found[-1][1]} if found else {}
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"not a whole {arch} model: tensor {error} is missing or misshapen") from None
        return cls(arch, len(layers), n_embd, vocab_size, head_size, dim_ffn, ranks)


def _detect(shapes: Mapping[str, tuple[int, ...]]) -> str:
    for arch, row in ARCHITECTURES.items():
        if any(name.endswith(row.marker) for name in shapes):
            return arch
    for marker, name in FOREIGN.items():
        if any(marker in tensor for tensor in shapes):
            raise ValueError(f"these are weights of {name}; this version reads: {', '.join(ARCHITECTURES)}")
    found = ", ".join(list(shapes)[:3]) or "none at all"
    raise ValueError(f"no RWKV model: expected tensors like emb.weight and blocks.0.att.r_k, found {found}")
