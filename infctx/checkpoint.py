"""Training state to and from disk: whole or not at all, and never code from a file.

A checkpoint is a folder: model.safetensors (published names), training.pt (all else) and manifest.json with
the size and hash of both, written last; it is renamed into place at once.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, TRAINING, MANIFEST = "model.safetensors", "training.pt", "manifest.json"


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
    sync(folder.parent)


def _fill(part: Path, weights: dict[str, Tensor], training: dict[str, Any], facts: dict[str, Any]) -> None:
    save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, part / WEIGHTS)
    torch.save(training, part / TRAINING)
    files = {
        name: {"bytes": (part / name).stat().st_size, "sha256": _hash(part / name)} for name in (WEIGHTS, TRAINING)
    }
    (part / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1))
    for name in (*files, MANIFEST):
        sync(part / name)
    part.chmod(0o755)


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and the rest of a training checkpoint, verified first. Raises: as `verify`."""
    verify(folder)
    folder = Path(folder)
    # Mapped, not read: of whole tensors a rank may need its pieces only.
    return load_file(folder / WEIGHTS), torch.load(folder / TRAINING, map_location="cpu", weights_only=True, mmap=True)


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


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
