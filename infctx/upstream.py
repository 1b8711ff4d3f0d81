"""The command `convert-recipe`: a recipe of RWKV-infctx-trainer, or its datapack, as a recipe of ours.

Every key that the old file has gets a line: kept, renamed, changed in meaning, not needed, or refused with the reason.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infctx.errors import UserError, require_yaml
from infctx.upstreamdata import data_section, datapack

STRATEGIES = {
    "auto": "auto", "ddp": "ddp", "fsdp": "fsdp2", "deepspeed_stage_1": "zero1", "deepspeed_stage_2": "zero2",
    "deepspeed_stage_2_offload": "zero2-offload", "deepspeed_stage_3": "zero3",
    "deepspeed_stage_3_offload": "zero3-offload",
}  # fmt: skip
ENGINES = {
    "auto": "auto",
    "ddp": "ddp",
    "fsdp2": {"class_path": "infctx.parallel.fsdp2.FSDP2"},
    **{f"zero{n}": {"class_path": "infctx.parallel.zero.ZeRO", "init_args": {"stage": n}} for n in (1, 2, 3)},
    **{
        f"zero{n}-offload": {"class_path": "infctx.parallel.zero.ZeRO", "init_args": {"stage": n, "offload": True}}
        for n in (2, 3)
    },
}
SAME = ("max_epochs", "max_steps", "max_time", "devices", "num_nodes", "accelerator", "gradient_clip_val",
        "accumulate_grad_batches", "limit_train_batches", "limit_val_batches", "val_check_interval",
        "check_val_every_n_epoch", "logger", "enable_progress_bar")  # fmt: skip
# Keys of `model` that stand for nothing any more, and why.
NEEDLESS = {
    "grad_cp": "memory is that of one segment anyway", "n_layer": "read from the weights",
    "n_embd": "read from the weights", "vocab_size": "read from the weights", "dim_att": "read from the weights",
    "dim_ffn": "read from the weights", "head_size": "read from the weights",
    "bptt_learning": "the gradient goes through segments always",
    "substep_cuda_cache_clear": "nothing is to be cleared", "substep_logging": "metrics.jsonl has a line a step",
    "consolidated_logging": "figures are sums over all ranks",
    "torch_set_float32_matmul_precision": "float32 is computed as float32",
}  # fmt: skip
# Keys of `model` that are accepted at these values only.
NEUTRAL: dict[str, tuple[Any, str]] = {
    "ctx_len_cutoffs": ([], "documents are read whole"),
    "ctx_len_warmup_steps": ([], "documents are read whole"),
    "dropout": (0.0, "there is dropout in adapters only"),
    "position_loss_bias": (1.0, "the loss is the mean over tokens"),
    "position_loss_bias_in_validation": (False, "the loss is the mean over tokens"),
    "token_loss_threshold": (0.0, "the loss is the mean over tokens"),
    "token_dropout_rate": (0.0, "the loss is the mean over tokens"),
    "layerwise_lr": (True, "decay parameters learn at 2 and 3 times the rate; see model.parts"),
    "bptt_learning_range": (-1, "all segments are learnt from; model.horizon says how far a gradient reaches"),
    "lr_period": (-1, "a schedule goes over the whole run"),
    "lr_period_type": ("epoch", "a schedule goes over the whole run"),
}


class Line(NamedTuple):
    """What became of a key."""

    key: str
    what: str
    note: str


def convert_recipe(old: str, out: str) -> None:
    """Write a recipe of RWKV-infctx-trainer, or its datapack, as a recipe of infctx, and say what became of each key.

    Args:
        old: its YAML file.
        out: the recipe to write.
    """
    require_yaml(["--config", old])
    given = yaml.safe_load(Path(old).read_text(encoding="utf-8"))
    recipe, lines = (_datapack if "datapack" in given else _recipe)(given)
    width = max([len(x.key) for x in lines], default=0)
    print("\n".join(f"{x.key:<{width}}  {x.what:<10} {x.note}".rstrip() for x in lines))
    refused = [x for x in lines if x.what == "refused"]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    Path(out).write_text(f"# From {Path(old).name}, a recipe of RWKV-infctx-trainer.\n{text}", encoding="utf-8")
    print(f"recipe: {out}" + (f"; {len(refused)} refused: mend them before you train" if refused else ""))
    if refused:
        raise UserError(f"{old}: {refused[0].key}: {refused[0].note}")


def _recipe(given: dict[str, Any]) -> tuple[dict[str, Any], list[Line]]:
    recipe: dict[str, Any] = {"model": {}, "data": {}, "trainer": {}}
    lines = list[Line]()
    for key, value in given.items():
        if key == "model":
            lines += _model(value or {}, recipe)
        elif key == "trainer":
            lines += _trainer(value or {}, recipe)
        elif key == "data":
            found, told = data_section(value or {})
            recipe["data"] |= found
            lines += [Line(f"data.{k}", what, note) for k, what, note in told]
        elif key == "seed_everything":
            recipe[key] = 0 if isinstance(value, bool) else value
            lines.append(Line(key, "changed" if isinstance(value, bool) else "kept", f"{recipe[key]}"))
        elif key == "ckpt_path" and value:
            lines.append(
                Line(key, "refused", "go on with a run of infctx by --resume; start from weights by model.load")
            )
        else:
            lines.append(Line(key, "not needed", ""))
    return recipe, lines


def _datapack(given: dict[str, Any]) -> tuple[dict[str, Any], list[Line]]:
    found, told = datapack(given)
    return {"data": found}, [Line(*x) for x in told]


def _model(given: dict[str, Any], recipe: dict[str, Any]) -> list[Line]:
    own, lines = recipe["model"], list[Line]()
    for key, value in given.items():
        if key in NEUTRAL:
            neutral, why = NEUTRAL[key]
            fine = value in (neutral, None)
            lines.append(Line(f"model.{key}", "not needed" if fine else "refused", why))
        elif key in NEEDLESS:
            lines.append(Line(f"model.{key}", "not needed", NEEDLESS[key]))
        elif key in MODEL:
            lines.append(Line(f"model.{key}", *MODEL[key](value, recipe)))
        elif key not in ("lr_init", "lr_final", "lr_type", "beta1", "beta2"):
            lines.append(Line(f"model.{key}", "refused", "no such key is known"))
    if "lr_init" in given:
        lines += _rates(given, own.setdefault("optimizer", {}))
    if "bptt_truncated_learning" not in given:
        lines.append(
            Line("model.bptt_truncated_learning", "changed", "the gradient is exact; model.horizon: 1 truncates it")
        )
    return lines


def _rates(given: dict[str, Any], optimizer: dict[str, Any]) -> list[Line]:
    first, last = float(given["lr_init"]), float(given.get("lr_final", -1))
    optimizer["lr"] = first
    lines = [Line("model.lr_init", "renamed", "model.optimizer.lr")]
    if last < 0 or last == first:
        optimizer["schedule"] = "constant"
    else:
        optimizer |= {"schedule": given.get("lr_type", "cosine"), "final_lr": last}
    for key in ("lr_final", "lr_type"):
        if key in given:
            note = f"model.optimizer.schedule {optimizer['schedule']}, which holds its floor at the end"
            lines.append(Line(f"model.{key}", "changed", note))
    if "beta1" in given or "beta2" in given:
        optimizer["betas"] = [float(given.get("beta1", 0.9)), float(given.get("beta2", 0.99))]
        lines += [
            Line(f"model.{key}", "renamed", "model.optimizer.betas") for key in ("beta1", "beta2") if key in given
        ]
    return lines


def _to(section: str, name: str, note: str = "") -> Callable[[Any, dict[str, Any]], tuple[str, str]]:
    def rule(value: Any, recipe: dict[str, Any]) -> tuple[str, str]:
        place = recipe
        for part in section.split("."):
            place = place.setdefault(part, {})
        place[name] = value
        return ("changed" if note else "renamed"), f"{section}.{name}{': ' if note else ''}{note}"

    return rule


def _horizon(value: Any, recipe: dict[str, Any]) -> tuple[str, str]:
    recipe["model"]["horizon"] = 1 if value else None
    return (
        "changed",
        "model.horizon: 1" if value else "model.horizon: null; the gradient was cut all the same, it is exact now",
    )


MODEL: dict[str, Callable[[Any, dict[str, Any]], tuple[str, str]]] = {
    "load_model": _to("model", "load"),
    "ctx_len": _to("data", "segment_length"),
    "bptt_truncated_learning": _horizon,
    "warmup_steps": lambda value, recipe: _to(
        "model.optimizer", "warmup_steps", "steps, and the schedule goes on after them"
    )(max(0, value), recipe),
    "weight_decay": _to("model.optimizer", "weight_decay", "of matrices, where it had no effect before"),
    "adam_eps": _to("model.optimizer", "eps"),
}


def _trainer(given: dict[str, Any], recipe: dict[str, Any]) -> list[Line]:
    own, lines = recipe["trainer"], list[Line]()
    for key, value in given.items():
        name = f"trainer.{key}"
        if key in SAME:
            own[key] = value
            lines.append(Line(name, "kept", ""))
        elif key == "precision":
            own[key] = {"bf16": "bf16-mixed", "bf16-true": "bf16-mixed", "32": "32-true"}.get(str(value), value)
            lines.append(Line(name, "kept" if own[key] == value else "renamed", str(own[key])))
        elif key == "microbatch_size":
            recipe["data"]["batch_size"] = value
            lines.append(Line(name, "renamed", "data.batch_size: lanes on each device"))
        elif key == "target_batch_size":
            lines.append(Line(name, *_accumulate(given, own)))
        elif key == "strategy":
            lines.append(Line(name, *_strategy(value, own)))
        elif key == "callbacks":
            lines += _checkpoints(value if isinstance(value, list) else [value], recipe)
        else:
            lines.append(Line(name, "not needed", ""))
    return lines


def _accumulate(given: dict[str, Any], own: dict[str, Any]) -> tuple[str, str]:
    devices, nodes = given.get("devices", "auto"), given.get("num_nodes", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if not str(devices).isdigit():
        return "refused", "set trainer.devices to a number, or trainer.accumulate_grad_batches yourself"
    lanes = int(devices) * int(nodes) * int(given.get("microbatch_size", 1))
    own["accumulate_grad_batches"] = max(1, int(given["target_batch_size"]) // lanes)
    return "renamed", f"trainer.accumulate_grad_batches: {own['accumulate_grad_batches']} windows of {lanes} lanes"


def _strategy(value: Any, own: dict[str, Any]) -> tuple[str, str]:
    name = STRATEGIES.get(str(value))
    if name is None:
        return "refused", f"{value}: choose a file of recipes/strategy"
    own["strategy"] = ENGINES[name]
    return "renamed", f"as recipes/strategy/{name}.yaml" if name not in ("auto",) else "auto"


def _checkpoints(callbacks: list[Any], recipe: dict[str, Any]) -> list[Line]:
    lines = []
    for callback in callbacks:
        options = (callback or {}).get("init_args") or {}
        if "ModelCheckpoint" not in str((callback or {}).get("class_path")):
            recipe["trainer"].setdefault("callbacks", []).append(callback)
            lines.append(Line("trainer.callbacks", "kept", str((callback or {}).get("class_path"))))
            continue
        own = recipe.setdefault("checkpoint", {})
        if options.get("every_n_train_steps"):
            own["every_n_steps"] = options["every_n_train_steps"]
        if options.get("save_top_k", 0) > 0:
            own["keep"] = options["save_top_k"]
        lines.append(Line("trainer.callbacks", "renamed", f"checkpoint: {own}; the newest are kept, in runs/NAME"))
    return lines
