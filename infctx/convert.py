"""The commands that make and change weight files."""

import math
import os
from pathlib import Path
from typing import Any, Literal

import torch

from infctx.checkpoint import runs_near
from infctx.config import ModelConfig
from infctx.layouts import Weights
from infctx.models.rwkv import RWKV, init_model
from infctx.sampling import SEEDS
from infctx.sizes import WORLD, sized
from infctx.tuning.adapters import merge as merge_adapters
from infctx.tuning.adapters import save_adapter
from infctx.weights import SUFFIXES, load_model, load_tuned, read_model, save_model, state_names, write_model
from infctx.world import write_tokenizer_files

Dtype = Literal["float32", "bfloat16", "float16"]
PROMPT = 64  # tokens of the comparison
MERGED = 1e-4  # of the largest logit: what merging may change in float32


def convert(
    src: str,
    dst: str,
    dtype: Dtype | None = None,
    verify: bool = False,
    tokenizer: Literal["auto", "world", "none"] = "auto",
) -> None:
    """Write the weights of a file or folder in another layout.

    Args:
        src: .pth, .safetensors, Hugging Face folder, checkpoint or run folder.
        dst: .pth or .safetensors: published names; a name without suffix: a folder for Hugging Face's software.
        dtype: of the weights; left out: as in src, bit for bit.
        verify: compare the logits of both on a fixed prompt.
        tokenizer: what a folder gets beside the weights; auto: the World tokenizer, if the vocabulary is its.
    """
    if Path(src).resolve() == Path(dst).resolve():
        raise ValueError(f"{dst}: src and dst are the same: name another file")
    require_new(dst)
    config, weights = read_model(src)
    if dtype is not None:
        weights = _cast_all(weights, dtype)
    write_model(config, weights, dst)
    print(f"{config.arch}, {sum(x.numel() for x in weights.values()):,} parameters: {dst}")
    if Path(dst).suffix not in SUFFIXES:
        world = tokenizer == "world" or (tokenizer == "auto" and config.vocab_size == WORLD)
        if world:
            write_tokenizer_files(dst)
        print(f"tokenizer: {'World' if world else 'none: put the files of your own beside the weights'}")
    if verify:
        difference = compare(src, dst)
        print(f"logits of {PROMPT} tokens: largest difference {difference:.1e} of the largest logit")
        if not difference <= (0 if dtype is None else 0.5):  # also not a number
            raise ValueError(f"{dst}: its logits are not those of {src}: do not use it")


def _cast_all(weights: Weights, dtype: Dtype) -> Weights:
    kept = state_names(weights)  # float32 in every runtime
    return {name: x if name in kept else _cast(name, x, getattr(torch, dtype)) for name, x in weights.items()}


def _cast(name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    low = x.to(dtype)
    if not torch.equal(low.isfinite(), x.isfinite()):
        raise ValueError(f"{name} reaches {x.abs().max():.1e}, which {dtype} cannot hold: take bfloat16 or float32")
    return low


def compare(left: str | Path, right: str | Path) -> float:
    """The largest difference between the logits of two weight files in float32, over the largest of the first."""
    return _difference(*(_logits(load_model(path, torch.float32)) for path in (left, right)))


def require_new(out: str) -> None:
    """Raises: ValueError for a file that is there."""
    if Path(out).is_file():
        raise ValueError(f"{out}: there is such a file already: choose another name, or remove it")


def merge(run: str, out: str, dtype: Dtype = "float32") -> None:
    """Write the weights of a run with adapters, with these added to them.

    Args:
        run: run folder (its newest sound checkpoint) or checkpoint folder.
        out: file to write: .pth or .safetensors; a name without suffix: a folder for Hugging Face's software.
        dtype: of the weights, after the addition in float32.
    """
    require_new(out)
    model = _tuned(run)
    before = _logits(model)
    merge_adapters(model)
    difference = _difference(before, _logits(model))
    print(f"logits of {PROMPT} tokens, merged in float32: largest difference {difference:.1e} of the largest logit")
    if not difference <= MERGED:
        raise ValueError(f"{run}: not merged: the logits would differ by more than {MERGED:.0e}; export --what adapter")
    weights = _cast_all(dict(model.state_dict()), dtype)
    write_model(model.config, weights, out)
    states = state_names(weights)
    what = f"weights with adapters added, in {dtype}, {'and' if states else 'without'} a learnt initial state"
    print(f"{model.config.arch}, {sum(x.numel() for x in weights.values()):,} parameters: {what}: {out}")


def export_adapter(run: str, out: str) -> None:
    """Write the adapters of a run as a folder of the peft library. Raises: ValueError if it has none to write."""
    model = _tuned(run)
    config: Any = model.peft_config
    if getattr(config["default"], "init_lora_weights", None) == "pissa":
        raise ValueError(f"{run}: pissa has changed the weights that its adapters belong to: export the whole model")
    save_adapter(model, out)
    if state_names(model.state_dict()):
        print(f"the learnt initial state is not in it: `infctx export {run} FILE --what state` writes that")


def _tuned(run: str) -> RWKV:
    model = load_tuned(run)
    if model is None and not Path(run).exists():
        raise FileNotFoundError(f"{run}: no such file{runs_near(run)}")
    if model is None:
        raise ValueError(f"{run}: no run with adapters: train with model.tuning {{method: lora}}, or another of them")
    return model


def _logits(model: RWKV) -> torch.Tensor:
    tokens = (torch.arange(1, PROMPT + 1) * 7919 % model.config.vocab_size).unsqueeze(0)
    with torch.inference_mode():
        return model.eval()(tokens)[0]


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / left.abs().max().clamp(min=1e-30))


def init(
    out: str, arch: str = "rwkv7", size: str | None = None, n_layer: int | None = None, n_embd: int | None = None,
    vocab_size: int | None = None, head_size: int | None = None, dim_ffn: int | None = None,
    ranks: dict[str, int] | None = None, n_gold: int | None = None, seed: int = 0, dtype: Dtype = "float32",
) -> None:  # fmt: skip
    """Write a new model with the official initial values of its architecture.

    Args:
        out: .pth or .safetensors, or a name without suffix: a folder for Hugging Face's software.
        arch: architecture.
        size: a published size, such as 0.1b; what is given beside it wins.
        n_layer: layers.
        n_embd: channels.
        vocab_size: token ids.
        head_size: channels of a head.
        dim_ffn: channels inside channel mixing.
        ranks: of the low-rank parts by name.
        n_gold: goldfinch: attention layers.
        seed: of the random values.
        dtype: of the weights.
    """
    require_new(out)
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    config = sized(
        arch, size, n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, head_size=head_size, dim_ffn=dim_ffn,
        ranks=ranks, n_gold=n_gold,
    )  # fmt: skip
    model = _initial(config, seed).to(getattr(torch, dtype))
    save_model(model, out)
    state = sum(math.prod(x.shape) for block in model.initial_state(1).blocks for x in block)
    print(
        f"{config.arch}, {sum(p.numel() for p in model.parameters()):,} parameters, state of {state:,} numbers: {out}"
    )


def _initial(config: ModelConfig, seed: int) -> RWKV:
    """A new model. Raises: ValueError if there is no memory for it."""
    small = "choose fewer n_layer, n_embd or vocab_size"
    try:
        with torch.device("meta"):
            size = sum(4 * p.numel() for p in RWKV(config).parameters())
        if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise ValueError(
                f"{config.arch}: its weights are {size / 1e9:,.0f} GB, more than this machine's memory: {small}"
            )
        return init_model(config, seed)
    except RuntimeError as error:  # what torch makes of sizes that no memory holds
        raise ValueError(f"{config.arch}: no memory for it: {str(error).splitlines()[0][:200]}: {small}") from None
