"""Weights and training state to and from disk: whole or not at all, and never code from a file.

A training checkpoint is a folder: model.safetensors (published names), training.pt (all else) and manifest.json with
the size and hash of both, written last; it is renamed into place at once.
"""

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infctx.config import ModelConfig
from infctx.models.rwkv import RWKV

WEIGHTS, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", kernel: str = "auto"
) -> RWKV:
    """Build the model that a file holds; architecture and sizes are found from its tensors.

    Args:
        path: .pth, .safetensors, a checkpoint folder, or a run folder (its newest sound checkpoint).
        dtype: of the parameters; None: the file's. device: where they go. kernel: backend of the recurrence.
    Raises: FileNotFoundError, or ValueError if the file is not a whole model, or would run code.
    """
    weights = read_weights(path)
    try:
        config = ModelConfig.from_weights(weights)
        with torch.device("meta"):
            model = RWKV(config, kernel)
        own = {name: p for name, p in model.named_parameters() if not p.requires_grad and name not in weights}
        spare = {name: torch.zeros(p.shape, dtype=weights["emb.weight"].dtype) for name, p in own.items()}
        model.load_state_dict(
            {name: x.to(device, dtype, copy=True) for name, x in (weights | spare).items()}, assign=True
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {_first_lines(error)}") from None
    return model


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write the weights under their published names, whole or not at all. Raises: ValueError for an unknown suffix."""
    path = Path(path)
    writers: dict[str, Callable[[dict[str, Tensor], Path], None]] = {".pth": torch.save, ".safetensors": save_file}
    if path.suffix not in writers:
        raise ValueError(f"{path}: weights are written as {' or '.join(writers)}; end the name so")
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        writers[path.suffix](weights, Path(part))
        Path(part).chmod(0o644)
        _sync(Path(part))
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file, memory-mapped. Raises: as `load_model`."""
    path = Path(path)
    if path.is_dir():
        path = (path if (path / WEIGHTS).exists() else newest(path)) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        weights = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: not a plain file of tensors (it is damaged, or would run code)") from None
    except (RuntimeError, OSError, EOFError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable weight file: {_first_lines(error)}") from None
    if not isinstance(weights, Mapping) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: expected tensors by name, found other things: is this a checkpoint of a trainer?")
    return dict(weights)


def save_checkpoint(
    folder: str | Path, weights: dict[str, Tensor], training: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write a training checkpoint, replacing `folder` only when all of it is on disk. Args: facts: for the manifest."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _fill(part, weights, training, facts)
    except BaseException:
        shutil.rmtree(part)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    _sync(folder.parent)


def _fill(part: Path, weights: dict[str, Tensor], training: dict[str, Any], facts: dict[str, Any]) -> None:
    save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, part / WEIGHTS)
    torch.save(training, part / TRAINING)
    files = {
        name: {"bytes": (part / name).stat().st_size, "sha256": _hash(part / name)} for name in (WEIGHTS, TRAINING)
    }
    (part / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1))
    for name in (*files, MANIFEST):
        _sync(part / name)
    part.chmod(0o755)


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and the rest of a training checkpoint, verified first. Raises: as `verify`."""
    verify(folder)
    folder = Path(folder)
    return load_file(folder / WEIGHTS), torch.load(folder / TRAINING, map_location="cpu", weights_only=True)


def verify(folder: str | Path) -> dict[str, Any]:
    """The manifest of a training checkpoint, if every file is as it says.

    Raises: FileNotFoundError if there is none, ValueError naming the file that is damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint there (no {MANIFEST})")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (ValueError, KeyError):
        raise ValueError(f"{folder / MANIFEST}: damaged; take an earlier checkpoint") from None
    for name, fact in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != fact["bytes"] or _hash(file) != fact["sha256"]:
            raise ValueError(f"{file}: damaged or missing; take an earlier checkpoint")
    return manifest


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the newest last."""
    folders = [x for x in Path(run, "checkpoints").glob("step-*") if x.name[5:].isdigit()]
    return sorted(folders, key=lambda x: int(x.name[5:]))


def newest(run: str | Path) -> Path:
    """The newest sound checkpoint of a run; says which it passed over. Raises: FileNotFoundError if there is none."""
    for folder in reversed(checkpoints(run)):
        try:
            verify(folder)
            return folder
        except (ValueError, FileNotFoundError) as error:
            print(f"checkpoint passed over: {error}")
    raise FileNotFoundError(f"{run}: no sound checkpoint there")


def _hash(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]
