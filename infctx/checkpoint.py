"""Training state to and from disk: whole or not at all, and never code from a file.

A checkpoint is a folder: model.safetensors (published names), training.pt (all else) and manifest.json with
the size and hash of both, written last; it is renamed into place at once. Where what is trained is cut up over ranks,
each of them writes a share of the tensors, in files of its own (model-00001-of-00002.safetensors, ...).
"""

import hashlib
import json
import os
import shutil
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, TRAINING, MANIFEST = Path("model.safetensors"), Path("training.pt"), "manifest.json"
STATES = "optimizer_states"  # Lightning's name


def save_checkpoint(
    folder: str | Path,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    facts: dict[str, Any],
    together: bool = False,
) -> None:
    """Write a training checkpoint, replacing `folder` only when all of it is on disk.

    Args:
        facts: for the manifest.
        together: all ranks call this, and each one writes the tensors that it has: those of `weights`, and those of the
            weights' optimizer states in `training`. All else is the first rank's.
    """
    folder, (rank, ranks) = Path(folder), (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    part = _told(_make_part(folder) if rank == 0 else None, ranks)
    try:
        files = _fill(part, weights, training, rank, ranks)
        if rank == 0:
            _finish(part, folder, {**facts, "files": files})
    except BaseException:
        if rank == 0:
            shutil.rmtree(part)
        raise


def _make_part(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    part.chmod(0o755)
    return part


def _told(x: Any, ranks: int) -> Any:
    told = [x]
    if ranks > 1:
        dist.broadcast_object_list(told)
    return told[0]


def _fill(part: Path, weights: dict[str, Tensor], training: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Write this rank's files. Returns: those of all ranks, with size and hash."""
    if not part.is_dir():
        raise ValueError(f"{part}: rank 0 has made it, rank {rank} does not see it: put the run's folder on a file "
                         "system that all nodes share")  # fmt: skip
    names = [f"{x.stem}-{rank + 1:05}-of-{ranks:05}{x.suffix}" if ranks > 1 else x.name for x in (WEIGHTS, TRAINING)]
    save_file({name: x.detach().cpu().contiguous() for name, x in weights.items()}, part / names[0])
    torch.save(training if rank == 0 else {STATES: training[STATES]}, part / names[1])
    files = {name: {"bytes": (part / name).stat().st_size, "sha256": _hash(part / name)} for name in names}
    for name in files:
        sync(part / name)
    if ranks == 1:
        return files
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, files)
    return {name: fact for own in gathered for name, fact in own.items()}


def _finish(part: Path, folder: Path, manifest: dict[str, Any]) -> None:
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    sync(part / MANIFEST)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    sync(folder.parent)


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and the rest of a training checkpoint, by however many ranks it was written. Raises: as `verify`."""
    verify(folder)
    # Mapped, not read: of whole tensors a rank may need its pieces only.
    weights = {name: x for file in weight_files(folder) for name, x in load_file(file).items()}
    first, *others = (
        torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in _files(folder, TRAINING)
    )
    for other in others:
        for whole, more in zip(first[STATES], other[STATES], strict=True):
            whole["state"] |= more["state"]
    return weights, first


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a training checkpoint that have weights; each weight is whole in one of them."""
    return _files(folder, WEIGHTS)


def _files(folder: str | Path, kind: Path) -> list[Path]:
    names = json.loads(Path(folder, MANIFEST).read_text())["files"]
    return [Path(folder, name) for name in sorted(names) if Path(name).suffix == kind.suffix]


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


def runs_near(path: str | Path) -> str:
    """Of a path that is not there: the runs in the same folder, or in runs/, whose names are nearest."""
    path = Path(path)
    for folder in () if path.exists() or path.suffix in (".pth", WEIGHTS.suffix) else (path.parent, Path("runs")):
        runs = [x.parent for x in folder.glob("*/config.yaml") if (x.parent / "checkpoints").is_dir()]
        if runs:
            names = get_close_matches(path.name, sorted(x.name for x in runs), 5, 0)
            return f"; runs there are: {', '.join(str(folder / x) for x in names)}{', ...' * (len(runs) > 5)}"
    return ""


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
