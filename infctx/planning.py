"""The command `plan`: from a recipe to a forecast. What it reads of a recipe, `check` reads too."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import dict_to_namespace

from infctx.borders import StatesConfig
from infctx.config import ModelConfig
from infctx.curves import PLANNED
from infctx.data import DocumentData
from infctx.devices import find
from infctx.engines import STRATEGIES
from infctx.errors import UserError
from infctx.job import Job, require_steps
from infctx.ops.backends import require_known
from infctx.optim import OptimizerConfig
from infctx.parallel.config import ParallelConfig
from infctx.parts import Part
from infctx.plan import Forecast, Run
from infctx.plantext import explain, heading, table
from infctx.refusals import refuse_precision, refuse_strategy
from infctx.segments import Plan
from infctx.sources import as_sources
from infctx.tuning.config import Tuning
from infctx.weights import read_model

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
WORTH = 60  # seconds of a run beside which the few that a plan takes are nothing
_UNPREPARED = "data.path {} holds no prepared data: run `infctx prepare`"
PRECISIONS = {"bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed"}


def spell_out(argv: list[str]) -> list[str]:
    """`--ranks 1 2 4` and `--explain` as the parser of recipes takes them: one value each. Raises: UserError."""
    if not any(x.startswith(("-c", "--config", "--data.", "-h", "--help", "--print_config")) for x in argv):
        raise UserError(f"{argv[0]}: give a recipe: infctx {argv[0]} -c recipe.yaml")
    out, words = list[str](), list(argv)
    while words:
        word = words.pop(0)
        if word.split("=")[0] == "--ranks":
            given = word.split("=")[1:]
            while "=" not in word and words and (words[0][0] != "-" or words[0][1:].isdigit()):
                given.append(words.pop(0))
            out.append(f"--ranks={_ranks(given)}")
        elif word == "--explain":
            value = words.pop(0) if words and words[0].lower() in ("true", "false") else "true"
            out.append(f"--explain={value.lower()}")
        else:
            out.append(word)
    return out


def _ranks(given: list[str]) -> list[int]:
    """Of `1 2 4`, `1,2,4` or `[1, 2, 4]`. Raises: UserError."""
    numbers = " ".join(given).replace("[", " ").replace("]", " ").replace(",", " ").split()
    if not numbers or not all(x.isdecimal() and int(x) > 0 for x in numbers):
        raise UserError("--ranks takes whole numbers of at least 1: --ranks 1 2 4")
    return [int(x) for x in numbers]


def plan_recipe(config: Any) -> None:
    """Print what a recipe needs. Raises: ValueError naming the key that cannot be planned with."""
    run = _run_of(config)
    every = config.ranks or sorted({n * run.time for n in (1, 2, 4, 8)})
    for n in every:
        parallel_of(config).lane_groups(n)
        strategy_name(config.trainer.strategy, n)
    forecast = Forecast(run)
    rows = forecast.rows(every)
    lines = [*heading(forecast), "", *table(rows, run.job.segment_length)]
    print("\n".join(lines + (explain(forecast, rows) if config.explain else [])))


def planned(recipe: Path, ranks: int) -> dict[str, Any]:
    """What a run's own strategy needs on this machine: bytes of a rank at the peak, and tokens a second of all ranks.

    Args: recipe: config.yaml of a run. Raises: ValueError if it cannot be planned with here.
    """
    config = dict_to_namespace(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    config.update(dict_to_namespace({"device": "measured", "tokens": None}))
    if read := model_config(config.model).n_gold:
        raise ValueError(f"{read} layers of attention take long to plan: run `infctx plan -c {recipe}`")
    forecast, cut = Forecast(_run_of(config)), STRATEGIES[strategy_name(config.trainer.strategy, ranks)]
    row = forecast.brief(cut, ranks)
    return {"strategy": cut.name, "peak_memory_bytes": row[0], "tokens_per_second": row[1]}


def note_plan(run: Path, ranks: int, device: torch.device, seconds: float = math.inf) -> None:
    """Keep beside a run what was to be expected of it, or why that is not known: for its page.

    Args: device: that the run had. seconds: that it took.
    """
    noted: dict[str, Any] = {"ranks": ranks, "device": _kind(device)}
    try:
        if _kind(device) != _kind(_here()):
            raise ValueError("the run had another device than would be measured here")
        if seconds < WORTH:
            raise ValueError(f"the run took less than {WORTH} s; `infctx report {run}` plans it")
        noted |= planned(run / "config.yaml", ranks)
    except (ValueError, OSError, RuntimeError) as error:  # the run is what counts: a device may be full, a file gone
        noted["skipped"] = (str(error).splitlines() or [type(error).__name__])[0]
    (run / PLANNED).write_text(json.dumps(noted))


def plan_again(run: Path) -> None:
    """Plan a run that was noted without a plan, on a machine as it had; elsewhere its note stays."""
    noted, here = json.loads((run / PLANNED).read_text()), _here()
    if noted["device"] == _kind(here):
        note_plan(run, noted["ranks"], here)


def _here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def parallel_of(config: Any) -> ParallelConfig:
    """The section `parallel`."""
    return ParallelConfig(**config.parallel.as_dict())


def _run_of(config: Any) -> Run:
    model, data, trainer = config.model, config.data, config.trainer
    require_sound(config)
    device, parallel, sizes = find(config.device), parallel_of(config), model_config(model)
    parallel.require(False, bool(sizes.n_gold))
    if model.kernel.split("-")[0] in {"cpu": ("cuda", "fla"), "cuda": ("cpu",)}[device.kind]:
        raise ValueError(f"model.kernel {model.kernel} does not run on {device.name}: choose auto")
    segments, tokens = _longest_window(_documents(data, config.tokens), config)
    job = Job(
        sizes, data.batch_size, data.segment_length, segments, model.horizon,
        StatesConfig(**config.states.as_dict()), PRECISIONS.get(str(trainer.precision), "fp32"), model.kernel,
        device.kind, device.multiprocessors, tuning=tuning_of(model), parts=parts_of(model),
        optimizer=model.optimizer.name,
    )  # fmt: skip
    return Run(job, device, parallel.time, parallel.schedule == "scan", trainer.accumulate_grad_batches, tokens)


def require_sound(config: Any) -> None:
    """What `fit` refuses too, before it has made anything. Raises: ValueError that names the key."""
    model, data, trainer = config.model, config.data, config.trainer
    refuse_precision(trainer.precision)
    require_known(model.kernel)
    if str(trainer.accelerator) not in ACCELERATORS:
        raise ValueError(f"trainer.accelerator {trainer.accelerator} is not supported: choose auto, cpu or gpu")
    if model.horizon is not None and model.horizon < 1:
        raise ValueError(f"model.horizon must be at least 1 segment, or null for the whole window, got {model.horizon}")
    sizes = {f"data.{key}": data[key] for key in ("segment_length", "segments_per_window", "batch_size")}
    for key, value in {**sizes, "--tokens": getattr(config, "tokens", None)}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    OptimizerConfig(**model.optimizer.as_dict())
    require_steps(trainer)


def strategy_name(strategy: Any, ranks: int) -> str:
    """The name in recipes/strategy of what a recipe has. Raises: ValueError if it is none of them."""
    if strategy is None or strategy == "auto":
        return "ddp" if ranks > 1 else "single"
    options: dict[str, Any] = {}
    if isinstance(strategy, str):
        kind = strategy.split("_find_unused_parameters_")[0]
    else:
        kind, options = strategy.class_path.rsplit(".", 1)[-1], strategy.as_dict().get("init_args") or {}
    if kind == "ZeRO":
        stage = options.get("stage", 2)
        return f"zero{stage}-offload" if options.get("offload") and stage > 1 else f"zero{stage}"
    names = {"ddp": "ddp", "DDPStrategy": "ddp", "FSDP2": "fsdp2", "SingleDeviceStrategy": "single"}
    if kind not in names:
        refuse_strategy(kind)
    return names[kind]


def tuning_of(model: Any) -> Tuning | None:
    """Of the section `model`."""
    return None if model.tuning is None else Tuning(**model.tuning.as_dict())


def parts_of(model: Any) -> tuple[Part, ...]:
    """Of the section `model`."""
    return tuple(Part(**part.as_dict()) for part in model.parts)


def model_config(model: Any) -> ModelConfig:
    """Its sizes. Raises: ValueError if the section `model` has none, or they do not go together."""
    if model.load is not None:
        return read_model(model.load)[0]
    if model.init is None:
        raise ValueError("model: give load (weights to start from) or init (sizes of a new model)")
    return ModelConfig(**model.init.as_dict())


def _documents(data: Any, tokens: int | None) -> np.ndarray | None:
    """Input tokens of each prepared document; None if a length was given, or if nothing is prepared."""
    if tokens is not None:
        return None
    if Path(data.path, "prepared.json").exists():
        return opened(data).lengths(0)
    if data.segments_per_window == "document":
        raise ValueError(f"{_UNPREPARED.format(data.path)}, or give --tokens N of the longest document")
    return None


def opened(data: Any) -> DocumentData:
    """The prepared documents of a section `data`. Raises: ValueError if there are none."""
    if not Path(data.path, "prepared.json").exists():
        raise ValueError(_UNPREPARED.format(data.path))
    made = data_of(data)
    made.setup("fit")
    return made


def data_of(data: Any) -> DocumentData:
    """Of a section `data`, as it is before anything is prepared or read."""
    options = {k: v for k, v in data.as_dict().items() if k != "parallel"}
    for key in ("source", "validation"):
        options[key] = as_sources(options[key])
    return DocumentData(**options)


def stand_in(trainer: Any, ranks: int, rank: int) -> Any:
    """What `DocumentData` asks of a trainer, by the section `trainer`: one of so many ranks, before its first epoch."""
    return SimpleNamespace(
        world_size=ranks, global_rank=rank, current_epoch=0, max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps, accumulate_grad_batches=trainer.accumulate_grad_batches,
        limit_train_batches=1.0 if trainer.limit_train_batches is None else trainer.limit_train_batches,
    )  # fmt: skip


def _longest_window(documents: np.ndarray | None, config: Any) -> tuple[int, int | None]:
    """Segments of the longest window, and tokens of an epoch if there are documents to count them."""
    data, tokens = config.data, config.tokens
    numbered = None if data.segments_per_window == "document" else int(data.segments_per_window)
    if documents is not None:
        plan = Plan(documents, data.batch_size, data.segment_length, numbered, int(config.seed_everything), 0)
        return int(np.diff(plan.borders).max()) // data.segment_length, int(documents.sum())
    counts = [numbered, None if tokens is None else -(-tokens // data.segment_length)]
    return min(x for x in counts if x is not None), None
