"""Names of tensors: the published ones, and those that other software gives the same tensors.

C channels, N channels per head. Layouts: `hf`, of transformers' RWKV-4 and of the remote code of the RWKV-5 and RWKV-6
repositories; `fla`, of flash-linear-attention's RWKV-7. Trainers' prefixes are taken off.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infctx.config import ModelConfig

Weights = dict[str, Tensor]
PREFIXES = ("_forward_module.", "_orig_mod.", "base_model.model.", "state_dict.", "module.", "model.")
HF_VERSIONS = {"rwkv4": "", "rwkv5": "5", "rwkv6": "6"}
_HF = [
    ("emb.", "embeddings."), ("ln0.", "pre_ln."), (".att.", ".attention."), (".ffn.", ".feed_forward."),
    *((f".time_mix_{x[0]}", f".time_mix_{x}") for x in ("key", "value", "receptance", "gate")),
]  # fmt: skip
_FLA = [
    ("emb.", "model.embeddings."), ("blocks.", "model.layers."), ("ln_out.", "model.norm."), ("head.", "lm_head."),
    ("ln0.", "pre_norm."), ("ln1.", "attn_norm."), ("ln2.", "ffn_norm."), (".att.", ".attn."), ("ln_x.", "g_norm."),
    *((f".attn.{x}.", f".attn.{x[0]}_proj.") for x in ("receptance", "key", "value", "output")),
    *((f".attn.{x}{i}", f".attn.{x}_lora.lora.{part}") for x in "wavg"
      for i, part in enumerate(("2.bias", "0.weight", "2.weight"))),
]  # fmt: skip
_TRANSPOSED = re.compile(r"\.att\.[wavg][12]$")
_FLAT = re.compile(r"\.(att\.([wav]0|k_k|k_a)|ffn\.x_k)$")
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]$")  # layer 0 has nothing to mix its values with
_PACKED = "rwkvag"  # the order of the rows of attn.x_x in the first fla files


def to_published(weights: Mapping[str, Tensor]) -> Weights:
    """The same tensors under the published names, whatever layout they come in. Raises: ValueError, see `fla_scale`."""
    names = list(weights)
    if any(name.startswith("model.layers.") for name in names):
        return _from_fla(weights)
    if any(name.startswith("rwkv.blocks.") for name in names):
        return {_renamed(name.removeprefix("rwkv."), _HF, back=True): x for name, x in weights.items()}
    prefix = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
    return to_published({n.removeprefix(prefix): x for n, x in weights.items()}) if prefix else dict(weights)


def to_layout(weights: Mapping[str, Tensor], config: ModelConfig) -> tuple[Weights, Weights]:
    """The tensors as Hugging Face's software for this architecture names them, and those that it has no place for.

    Raises: ValueError if there is no such software, or it could not run the model as it is.
    """
    if config.arch in HF_VERSIONS:
        renamed = {name: _renamed(name, _HF) for name in weights}
        return {new if new == "head.weight" else f"rwkv.{new}": weights[name] for name, new in renamed.items()}, {}
    if config.arch != "rwkv7":
        raise ValueError(f"there is no Hugging Face layout for {config.arch}: write a .pth or .safetensors file")
    scaled = _scaled(weights, fla_scale(config.head_size))
    unused = {name: x for name, x in scaled.items() if _UNUSED.match(name)}
    return {_renamed(name, _FLA): _to_fla(name, x) for name, x in scaled.items() if name not in unused}, unused


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model in the layout of `to_layout`."""
    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "num_hidden_layers": config.n_layer,
        "intermediate_size": config.dim_ffn, "tie_word_embeddings": False, "use_cache": True, "bos_token_id": 0,
        "eos_token_id": 0, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if config.arch == "rwkv7":
        ranks = {"decay": "w", "a": "a", "v": "v", "gate": "g"}
        return {
            "model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], **common, "attn_mode": "chunk",
            "head_dim": config.head_size, "num_heads": config.n_embd // config.head_size, "hidden_act": "sqrelu",
            "hidden_ratio": (config.dim_ffn or 0) / config.n_embd, "norm_eps": 1e-5, "norm_bias": True,
            "norm_first": True, "fuse_norm": False, "fuse_cross_entropy": False,
            **{f"{name}_low_rank_dim": config.ranks[rank] for name, rank in ranks.items()},
        }  # fmt: skip
    version = HF_VERSIONS[config.arch]
    heads = {"head_size": config.head_size} if version else {}
    return {
        "model_type": f"rwkv{version}", "architectures": [f"Rwkv{version}ForCausalLM"], **common, **heads,
        "attention_hidden_size": config.n_embd, "context_length": 4096, "layer_norm_epsilon": 1e-5, "rescale_every": 0,
    }  # fmt: skip


def check_hf_config(path: Path) -> None:
    """Refuse what config.json says and our models cannot be. Raises: ValueError naming the key."""
    try:
        facts = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path}: not JSON") from None
    fixed = {"norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "hidden_act": "sqrelu", "tie_word_embeddings": False}
    for key, value in fixed.items():
        if facts.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {facts[key]!r}: published models have {value!r}, and so have ours")


def fla_scale(head_size: int) -> float:
    """What receptance is multiplied by, and r_k divided by, so that fla's group norm gives what the published one does.

    The published epsilon is 64e-5 for every head size, fla's is N * 1e-5: norm(y, 64e-5) = norm(s y, N * 1e-5) with
    s^2 = N / 64. Only powers of two leave every bit of the weights as it was.

    Raises: ValueError for other head sizes, which would not come back as they were.
    """
    scale = math.sqrt(head_size / 64)
    if math.frexp(scale)[0] != 0.5:
        raise ValueError(
            f"flash-linear-attention's group norm differs from the published one at head size {head_size}, "
            "and no exact change of the weights makes up for it: use a .pth or .safetensors file"
        )
    return scale


def _from_fla(weights: Mapping[str, Tensor]) -> Weights:
    out: Weights = {}
    for name, x in weights.items():
        if name.endswith(".attn.x_x"):
            rows = {f"{name[:-3]}x_{letter}": row for letter, row in zip(_PACKED, x, strict=True)}
            out |= {_renamed(key, _FLA, back=True): row for key, row in rows.items()}
        else:
            published = _renamed(name, _FLA, back=True)
            out[published] = x.mT.contiguous() if _TRANSPOSED.search(published) else x
    r_k = out.get("blocks.0.att.r_k")
    return out if r_k is None or r_k.dim() != 2 else _scaled(out, 1 / fla_scale(r_k.shape[1]))


def _to_fla(name: str, x: Tensor) -> Tensor:
    if _TRANSPOSED.search(name):
        return x.mT.contiguous()
    return x.flatten() if _FLAT.search(name) else x


def _scaled(weights: Mapping[str, Tensor], scale: float) -> Weights:
    if scale == 1:
        return dict(weights)
    factor, out = {"att.receptance.weight": scale, "att.r_k": 1 / scale}, dict(weights)
    for name, x in weights.items():
        if (by := factor.get(name.split(".", 2)[-1])) is not None:
            out[name] = x * by
            if not torch.equal(out[name] / by, x):
                raise ValueError(f"{name} cannot be scaled exactly in {x.dtype}: give another dtype")
    return out


def _renamed(name: str, pairs: list[tuple[str, str]], back: bool = False) -> str:
    for ours, theirs in reversed(pairs) if back else pairs:
        old, new = (theirs, ours) if back else (ours, theirs)
        if old in name and (old.endswith(".") or name.endswith(old)):
            name = name.replace(old, new)
    return name
