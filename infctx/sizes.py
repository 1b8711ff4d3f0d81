"""Published sizes by name, for new models and for checking what is built."""

from typing import Any

from infctx.config import ALIASES, ARCHITECTURES, ModelConfig

WORLD, PILE = 65536, 50277  # ids of the two vocabularies


def _sizes(vocab_size: int, rows: dict[str, tuple[int, int]]) -> dict[str, dict[str, Any]]:
    return {name: {"n_layer": n, "n_embd": c, "vocab_size": vocab_size} for name, (n, c) in rows.items()}


def _with_ranks(sizes: dict[str, dict[str, Any]], rows: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
    ranks = {name: {"w": w, "a": w, "v": v, "g": g} for name, (w, v, g) in rows.items()}
    return {name: {**size, "ranks": ranks[name]} for name, size in sizes.items()}


_V4 = {
    "0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096),
    "14b": (40, 5120),
}  # fmt: skip
_V5 = {"0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096)}
_V6 = {
    "0.1b": (12, 768), "0.4b": (24, 1024), "1.6b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096),
    "14b": (61, 4096),
}  # fmt: skip
_V7 = {
    "0.1b": (12, 768), "0.4b": (24, 1024), "1.5b": (24, 2048), "2.9b": (32, 2560), "7.2b": (32, 4096),
    "13.3b": (61, 4096),
}  # fmt: skip
# Ranks of the decay and the in-context rate, of the value residual, and of the gate.
_V7_RANKS = {
    "0.1b": (64, 32, 128), "0.4b": (64, 32, 128), "1.5b": (96, 64, 256), "2.9b": (96, 64, 320),
    "7.2b": (128, 96, 480), "13.3b": (192, 128, 384),
}  # fmt: skip
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "rwkv4": _sizes(PILE, _V4),
    "rwkv5": _sizes(WORLD, _V5),
    "rwkv6": _sizes(WORLD, _V6),
    "rwkv7": _with_ranks(_sizes(WORLD, _V7), _V7_RANKS),
    "rwkv7a": _with_ranks(_sizes(WORLD, {"0.1b": (12, 768)}), _V7_RANKS),
    "goldfinch": _sizes(WORLD, {"0.2b": (12, 768), "1.5b": (24, 2048)}),
}


def sized(arch: str, size: str | None = None, **sizes: Any) -> ModelConfig:
    """A published size by name, or free ones; what is given by hand wins.

    Args: arch: as ModelConfig's; size: such as "0.1b"; sizes: arguments of ModelConfig, None where nothing is said.
    Raises: ValueError if there is no such size, or if layers, channels or vocabulary are not said.
    """
    arch = ALIASES.get(arch, arch)
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch {arch!r} is not known; choose one of: {', '.join(ARCHITECTURES)}")
    published = SIZES.get(arch, {})
    if size is not None and size.lower() not in published:
        raise ValueError(f"size {size!r} of {arch} is not known; choose one of: {', '.join(published) or 'none'}")
    given = (published[size.lower()] if size else {}) | {name: x for name, x in sizes.items() if x is not None}
    if missing := [name for name in ("n_layer", "n_embd", "vocab_size") if name not in given]:
        raise ValueError(
            f"{', '.join(missing)} must be given, or a size: {', '.join(published) or 'none is published'}"
        )
    return ModelConfig(arch, **given)
