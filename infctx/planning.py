"""The command `plan`: from a recipe to a forecast. What it reads of a recipe, `check` reads too."""

from typing import Any

import numpy as np

from infctx.borders import StatesConfig
from infctx.config import ModelConfig
from infctx.costs import Job
from infctx.data import DocumentData
from infctx.devices import find
from infctx.ops.backends import require_known
from infctx.parallel.config import ParallelConfig
from infctx.plan import Forecast, Run
from infctx.plantext import explain, heading, table
from infctx.segments import Plan
from infctx.sources import as_sources
from infctx.training import refuse_precision
from infctx.weights import read_model

PRECISIONS = {"bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed", "bf16-true": "bf16"}


def spell_out(argv: list[str]) -> list[str]:
    """`--ranks 1 2 4` and `--explain` as the parser of recipes takes them: one value each."""
    out: list[str] = []
    for word in argv:
        if out and out[-1].startswith("--ranks=[") and word.isdigit():
            out[-1] = out[-1][:-1] + ("" if out[-1].endswith("[]") else ",") + word + "]"
        else:
            out.append({"--ranks": "--ranks=[]", "--explain": "--explain=true"}.get(word, word))
    return out


def plan_recipe(config: Any) -> None:
    """Print what a recipe needs. Raises: ValueError naming the key that cannot be planned with."""
    run, given = _run_of(config), config.ranks
    if any(n < 1 for n in given):
        raise ValueError(f"--ranks must be at least 1, got {given}")
    every = given or sorted({n * run.time for n in (1, 2, 4, 8)})
    for n in every:
        parallel_of(config).lane_groups(n)
    forecast = Forecast(run)
    rows = forecast.rows(every)
    print("\n".join(heading(forecast) + [""] + table(rows) + (explain(forecast, rows) if config.explain else [])))


def parallel_of(config: Any) -> ParallelConfig:
    """The section `parallel`."""
    return ParallelConfig(**config.parallel.as_dict())


def _run_of(config: Any) -> Run:
    model, data, trainer = config.model, config.data, config.trainer
    require_model(config)
    device, parallel = find(config.device), parallel_of(config)
    if model.kernel.split("-")[0] in {"cpu": ("cuda", "fla"), "cuda": ("cpu",)}[device.kind]:
        raise ValueError(f"model.kernel {model.kernel} does not run on {device.name}: choose auto")
    documents = _documents(data, config.tokens)
    segments, tokens = _longest(documents, data, config)
    job = Job(
        model_config(model), data.batch_size, data.segment_length, segments, model.horizon,
        StatesConfig(**config.states.as_dict()), PRECISIONS.get(str(trainer.precision), "fp32"), model.kernel,
        device.kind, device.multiprocessors,
    )  # fmt: skip
    return Run(job, device, parallel.time, parallel.schedule == "scan", trainer.accumulate_grad_batches, tokens)


def require_model(config: Any) -> None:
    """Raises: ValueError for a section `model` that no run could have."""
    model, data = config.model, config.data
    refuse_precision(config.trainer.precision)
    require_known(model.kernel)
    if model.horizon is not None and model.horizon < 1:
        raise ValueError(f"model.horizon must be at least 1 segment, or null for the whole window, got {model.horizon}")
    if model.tuning is not None:
        raise ValueError("model.tuning: only null (all weights) is there in this version")
    for key in ("segment_length", "batch_size"):
        if data[key] < 1:
            raise ValueError(f"data.{key} must be at least 1, got {data[key]}")


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
    try:
        return opened(data).lengths(0)
    except ValueError:
        if data.segments_per_window == "document":
            raise ValueError(
                f"data.path {data.path} holds no prepared data: run `infctx prepare`, or give --tokens N of the "
                "longest document"
            ) from None
        return None


def opened(data: Any) -> DocumentData:
    """The prepared documents of a section `data`. Raises: ValueError if there are none."""
    options = data.as_dict()
    for key in ("source", "validation"):
        options[key] = as_sources(options[key])
    made = DocumentData(**{k: v for k, v in options.items() if k != "parallel"})
    made.setup("fit")
    return made


def _longest(documents: np.ndarray | None, data: Any, config: Any) -> tuple[int, int | None]:
    """Segments of the longest window, and tokens of an epoch."""
    numbered = None if data.segments_per_window == "document" else int(data.segments_per_window)
    if documents is None:
        whole = -(-(config.tokens or 1) // data.segment_length)
        return (min(numbered, whole) if numbered and config.tokens else numbered or whole), None
    plan = Plan(documents, data.batch_size, data.segment_length, numbered, int(config.seed_everything), 0)
    return int(np.diff(plan.borders).max()) // data.segment_length, int(documents.sum())
