"""Weights to and from disk, in every layout in which people publish them; never code from a file.

Read: .pth, .safetensors, a folder of Hugging Face's (whole or in shards), a checkpoint or run folder. Files are mapped
into memory, not copied: what is not converted to another dtype takes no room of its own until it is changed.
"""

import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infctx.checkpoint import MANIFEST, checkpoints, newest, runs_near, sync, verify, weight_files
from infctx.config import ModelConfig
from infctx.layouts import Weights, check_hf_config, hf_config, to_layout, to_published
from infctx.models.rwkv import RWKV
from infctx.state import SHIFT_STATE, TIME_STATE
from infctx.tuning.adapters import merge
from infctx.tuning.base import fingerprint, require_trained
from infctx.tuning.config import Tuning
from infctx.tuning.tune import apply_tuning

SUFFIXES = (".pth", ".safetensors")
UNUSED = "unused.safetensors"  # what a folder's layout has no place for
_HF_FILES = ("model.safetensors", "pytorch_model.bin")


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", kernel: str = "auto"
) -> RWKV:
    """Build the model that a file holds; architecture and sizes are found from its tensors.

    Args:
        path: .pth, .safetensors, a Hugging Face folder, a checkpoint folder, or a run folder (its newest checkpoint).
        dtype: of the parameters; None: the file's. device: where they go. kernel: backend of the recurrence.
    Raises: FileNotFoundError, or ValueError if the file is not a whole model, or would run code.
    """
    config, weights = read_model(path)
    states = state_names(weights)
    if dtype is None and len(dtypes := {x.dtype for name, x in weights.items() if name not in states}) > 1:
        raise ValueError(f"{path}: its tensors are {' and '.join(sorted(map(str, dtypes)))}: say which dtype to take")
    with torch.device("meta"):
        model = RWKV(config, kernel)
        model.add_states(states)
    kept = dict.fromkeys(states, torch.float32) if dtype != torch.float64 else {}
    model.load_state_dict(
        {name: weights.pop(name).to(device, kept.get(name, dtype)) for name in list(weights)}, assign=True
    )
    return model


def state_names(weights: Iterable[str]) -> list[str]:
    """Of the tensors that are a learnt initial state."""
    return [name for name in weights if name.rsplit(".", 1)[-1] in (TIME_STATE, SHIFT_STATE)]


def load_tuned(path: str | Path) -> RWKV | None:
    """The model of a run with adapters, or of one of its checkpoints, with the adapters in it; None if it has none.

    Raises: ValueError if the weights that it was tuned on are not there, or are others now.
    """
    if _base_of(Path(path)) is None:
        return None
    folder = newest(path) if checkpoints(path) else Path(path)
    base = verify(folder)["base"]
    tuning = Tuning(**base["tuning"])
    if not Path(base["path"]).exists():
        raise ValueError(f"{path}: was tuned on {base['path']}, which is not there: put it back")
    model = load_model(base["path"], torch.float32)
    if fingerprint(model) != base["fingerprint"]:
        raise ValueError(f"{path}: was tuned on {base['path']}, which holds other weights now")
    apply_tuning(model, replace(tuning, start=None))
    trained = {name: x for file in weight_files(folder) for name, x in load_file(file).items()}
    require_trained(model, set(trained))
    model.load_state_dict(trained, strict=False)
    return model


def _base_of(path: Path) -> dict[str, Any] | None:
    """What a run or a checkpoint says of the weights that it was tuned on; nothing is verified, and no hash made."""
    for folder in reversed(checkpoints(path) or [path]):
        try:
            return json.loads((folder / MANIFEST).read_text()).get("base")
        except (OSError, ValueError):
            continue
    return None


def read_model(path: str | Path) -> tuple[ModelConfig, Weights]:
    """Sizes and tensors of a weight file, under the published names and in their shapes. Raises: as `load_model`."""
    if (tuned := load_tuned(path)) is not None:
        merge(tuned)
        return tuned.config, dict(tuned.state_dict())
    weights = read_weights(path)
    try:
        config = ModelConfig.from_weights(weights)
        return config, _fitted(weights, config)
    except ValueError as error:
        raise ValueError(f"{path}: {_first_lines(error)}") from None


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write the weights, whole or not at all. Args: path: .pth or .safetensors; a folder: for Hugging Face's software.

    Raises: ValueError for another suffix, a folder that is not empty, or a model that Hugging Face's software does not
        run.
    """
    config: Any = model.config
    write_model(config, {name: x.detach().cpu() for name, x in model.state_dict().items()}, path)


def write_model(config: ModelConfig, weights: Weights, path: str | Path) -> None:
    """As `save_model`, from tensors."""
    path = Path(path)
    if path.suffix not in (*SUFFIXES, "") and not path.is_dir() and not path.suffix[1:2].isdigit():
        raise ValueError(f"{path}: weights are written as {' or '.join(SUFFIXES)}, or as a folder (no suffix)")
    if path.suffix not in SUFFIXES and path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path}: there is something already, which new weights would mix with: name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        weights = _untied(weights)
        if path.suffix in SUFFIXES:
            _write_file({name: x.contiguous() for name, x in weights.items()}, part / path.name)
            (part / path.name).replace(path)
        else:
            _write_folder(config, weights, part / "folder")
            (part / "folder").replace(path)
        sync(path.parent)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OSError(f"{path}: not written: {_first_lines(error)}") from None
    finally:
        shutil.rmtree(part)


def _untied(weights: Weights) -> Weights:
    """Tensors that share memory, as a tied head does with the embedding, get their own: layouts have no ties."""
    seen: set[int] = set()
    out = {}
    for name, x in weights.items():
        out[name] = x.clone() if x.data_ptr() in seen and x.numel() else x
        seen.add(x.data_ptr())
    return out


def read_weights(path: str | Path) -> Weights:
    """The tensors of a weight file by their published names, memory-mapped. Raises: as `load_model`."""
    path = Path(path)
    weights: dict[str, Any] = {}
    for file in _files(path):
        weights |= _read(file)
    try:
        published = to_published(weights)
        return published | (_read(path / UNUSED) if (path / UNUSED).is_file() else {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file{runs_near(path)}")
    if (path / MANIFEST).is_file():
        verify(path)
        return weight_files(path)
    if (path / "config.json").is_file():
        check_hf_config(path / "config.json")
    for name in _HF_FILES:
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                return [path / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(f"{index}: not an index of shards") from None
        if (path / name).is_file():
            return [path / name]
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}: adapters alone: give the run that they come from, or what `infctx merge` makes of it"
        )
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{path}: no weights there: neither {' nor '.join(_HF_FILES)}, nor checkpoints of a run")
    return weight_files(newest(path))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        weights = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused: not a plain file of tensors (it is damaged, or would run code)") from None
    except Exception as error:  # a damaged file can raise anything in torch's reader
        raise ValueError(f"{path}: not a readable weight file: {_first_lines(error)}: copy it again") from None
    if not isinstance(weights, Mapping) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: expected tensors by name, found other things: is this a checkpoint of a trainer? "
                         "Take its file of weights alone")  # fmt: skip
    if odd := [n for n, x in weights.items() if not isinstance(n, str) or not _plain(x)]:
        raise ValueError(f"{path}: {odd[0]}: expected names and dense float32, bfloat16, float16 or float64 tensors")
    return {name: x.detach() for name, x in weights.items()}


def _plain(x: Tensor) -> bool:
    return x.layout == torch.strided and x.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fitted(weights: Weights, config: ModelConfig) -> Weights:
    """The tensors of a model, each in its published shape; what no layer uses may be missing, and is then zeros."""
    with torch.device("meta"):
        model = RWKV(config)
        model.add_states(state_names(weights))
    wanted, out = model.state_dict(), {}
    unused = {name for name, p in model.named_parameters() if not p.requires_grad}
    if odd := sorted(set(weights) - set(wanted)) or sorted(set(wanted) - set(weights) - unused):
        kind = "does not know" if odd[0] in weights else "needs, and the file lacks,"
        raise ValueError(f"a {config.arch} model {kind} {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}")
    for name, like in wanted.items():
        x = weights[name] if name in weights else torch.zeros(like.shape, dtype=weights["emb.weight"].dtype)
        if [n for n in x.shape if n != 1] != [n for n in like.shape if n != 1]:
            raise ValueError(f"{name} is {tuple(x.shape)}, expected {tuple(like.shape)}")
        out[name] = x.view(like.shape) if x.is_contiguous() else x.reshape(like.shape)
    return out


def _write_file(weights: Weights, path: Path) -> None:
    if path.suffix == ".pth":
        torch.save(
            {name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for name, x in weights.items()}, path
        )
    else:
        save_file(weights, path)
    path.chmod(0o644)
    sync(path)


def _write_folder(config: ModelConfig, weights: Weights, path: Path) -> None:
    from huggingface_hub import save_torch_state_dict  # nothing else of reading and writing weights needs it

    if state_names(weights):
        raise ValueError(f"{path}: Hugging Face's software would not begin with the learnt state: write .pth or "
                         ".safetensors, or the state alone by --what state")  # fmt: skip
    renamed, unused = to_layout(weights, config)
    path.mkdir()
    save_torch_state_dict(renamed, path)
    if unused:
        _write_file({name: x.contiguous() for name, x in unused.items()}, path / UNUSED)
    facts = hf_config(config, weights["emb.weight"].dtype)
    (path / "config.json").write_text(json.dumps(facts, indent=2) + "\n")


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]
