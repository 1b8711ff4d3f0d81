"""States to and from disk, and in the form in which other software keeps them.

A .safetensors file holds all parts of a state. A .pth file is the community's: `blocks.N.att.time_state` (H, V, K), the
matrices of one sequence and nothing else, in every version; runtimes of RWKV-5 and 6 transpose it, those of 7 do not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infctx.state import BlockState, KeyMemory, State

MEND = "give one that generate or chat --save_state, or export --what state, made with this model"
PARTS, KEPT, COMMUNITY = BlockState._fields, KeyMemory._fields[:3], "att.time_state"


def save_state(state: State, path: str | Path, facts: Mapping[str, str] | None = None) -> None:
    """Write a state. Args: path: .safetensors: all of it, and `facts`; .pth: the matrices of one sequence.

    Raises: ValueError for another suffix, or if a .pth file cannot hold this state.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(
            f"{path}: states are written as .safetensors (all parts) or .pth (time_state); end the name so"
        )
    matrices = _matrices(state, path) if path.suffix == ".pth" else []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        if matrices:
            torch.save({f"blocks.{i}.{COMMUNITY}": x for i, x in enumerate(matrices)}, part)
        else:
            save_file(_named(state), part, {"format": "pt", "infctx": json.dumps(dict(facts or {}))})
        part.replace(path)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OSError(f"{path}: not written: {str(error).splitlines()[0][:200]}") from None
    finally:
        part.unlink(missing_ok=True)


def load_state(path: str | Path, model: Any) -> tuple[State, dict[str, str]]:
    """A state from a file for `model`, and the facts written with it; what a .pth file lacks is as at a beginning.

    Raises: FileNotFoundError; ValueError if it is no state, or not one of this model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such state file")
    try:
        tensors, facts = _read(path)
    except Exception:  # a damaged file can raise anything in torch's reader
        raise ValueError(f"{path}: not a readable state file: {MEND}") from None
    if facts.get("arch", model.config.arch) != model.config.arch:
        raise ValueError(f"{path}: a state of {facts['arch']}, the model is {model.config.arch}: {MEND}")
    if any(name.endswith(COMMUNITY) for name in tensors):
        return _from_matrices(path, tensors, model), facts
    n = len(tensors.get("blocks.0.att_shift", ()))
    like = model.initial_state(n)
    wanted = _named(like)
    if set(wanted) != set(tensors) or n == 0:
        odd = sorted(set(wanted) ^ set(tensors))[:2]
        raise ValueError(f"{path}: not a state of this model: {', '.join(odd) or 'nothing in it'}: {MEND}")
    for name, x in wanted.items():
        if x.shape[1:] != tensors[name].shape[1:] or (len(x) != len(tensors[name]) and name[7:] not in KEPT[:2]):
            raise ValueError(f"{path}: {name} is {tuple(tensors[name].shape)}, this model's {tuple(x.shape)}")
        tensors[name] = tensors[name].to(x)
    blocks = tuple(BlockState(*(tensors[f"blocks.{i}.{part}"] for part in PARTS)) for i in range(len(like.blocks)))
    memory = like.memory and KeyMemory(*(tensors[f"memory.{part}"] for part in KEPT))
    if memory is not None and not _sound(memory, model.config.vocab_size):
        raise ValueError(f"{path}: its memory does not fit: damaged, or of a model with another vocabulary")
    return State(blocks, memory), facts


def to_runtime(state: State, arch: str) -> list[Tensor]:
    """One sequence's state as the `rwkv` package keeps it: a list of 3 tensors a layer, RWKV-4: of 5.

    Raises: ValueError for more sequences than one, and for GoldFinch, which that package does not run.
    """
    _refuse_memory(state, "the rwkv package")
    rows = []
    for att, ffn, wkv in (BlockState(*(x[0] for x in block)) for block in state.blocks):
        if arch == "rwkv4":
            n, d, m = wkv
            rows += [att, n, d, m, ffn]
        else:
            rows += [att, wkv if arch.startswith("rwkv7") else wkv.mT.contiguous(), ffn]
    return [x.clone() for x in rows]


def from_runtime(tensors: list[Tensor], arch: str) -> State:
    """The inverse of `to_runtime`."""
    size = 5 if arch == "rwkv4" else 3
    blocks = []
    for i in range(0, len(tensors), size):
        att, *wkv, ffn = tensors[i : i + size]
        matrix = torch.stack(wkv) if arch == "rwkv4" else wkv[0] if arch.startswith("rwkv7") else wkv[0].mT
        blocks.append(BlockState(att[None], ffn[None], matrix.contiguous()[None]))
    return State(tuple(blocks))


def _named(state: State) -> dict[str, Tensor]:
    tensors = {
        f"blocks.{i}.{part}": x for i, block in enumerate(state.blocks) for part, x in zip(PARTS, block, strict=True)
    }
    if state.memory is not None:
        tensors |= {f"memory.{part}": x for part, x in zip(KEPT, state.memory[:3], strict=True)}
    # Cloned: layers that begin alike may be one tensor, which the format refuses.
    return {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}


def _matrices(state: State, path: Path) -> list[Tensor]:
    _refuse_memory(state, f"{path}: a time_state file")
    if any(block.wkv.dim() != 4 for block in state.blocks):
        raise ValueError(f"{path}: RWKV-4 has no time_state; write a .safetensors file")
    return [block.wkv[0].detach().cpu().clone() for block in state.blocks]


def _sound(memory: KeyMemory, vocab_size: int) -> bool:
    tokens, keys, borders, _ = memory
    lengths = borders.diff()
    whole = len(tokens) == len(keys) == int(borders[-1]) and int(borders[0]) == 0 and bool((lengths >= 0).all())
    return whole and bool(((tokens >= 0) & (tokens < vocab_size)).all())


def _refuse_memory(state: State, what: str) -> None:
    if state.memory is not None:
        raise ValueError(f"{what} cannot hold GoldFinch's memory; write a .safetensors file")
    if len(state.blocks[0].wkv) != 1:
        raise ValueError(f"{what} holds one sequence, this state has {len(state.blocks[0].wkv)}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix != ".safetensors":
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
        if not named or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise ValueError(path)
        return tensors, {}
    with safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {}).get("infctx", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118, it is no dict


def _from_matrices(path: Path, tensors: dict[str, Tensor], model: Any) -> State:
    like = model.initial_state(1)
    blocks = []
    for i, block in enumerate(like.blocks):
        matrix = tensors.get(f"blocks.{i}.{COMMUNITY}")
        if matrix is None or matrix.shape != block.wkv.shape[1:] or len(tensors) != len(like.blocks):
            found = None if matrix is None else tuple(matrix.shape)
            raise ValueError(
                f"{path}: layer {i}: time_state {found} of {len(tensors)} layers is not of this model, which has "
                f"{len(like.blocks)} of {tuple(block.wkv.shape[1:])}"
            )
        blocks.append(block._replace(wkv=matrix.to(block.wkv).unsqueeze(0)))
    return State(tuple(blocks), like.memory)
