"""The data section of a recipe: prepared documents, split, planned, loaded."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

from infctx.documents import ArrowDocuments, prepare
from infctx.loader import WindowLoader
from infctx.parallel.config import ParallelConfig
from infctx.segments import Plan, Sources, Window
from infctx.sources import Source, chosen, listed
from infctx.tokenizer import load_tokenizer


class DocumentData(pl.LightningDataModule):
    """Documents of any length, in lanes.

    Args:
        source: where documents come from: one, or a list of them; --data.source.help lists the keys of one.
        path: the folder where `prepare` keeps the tokens; `fit` prepares what is missing or stale.
        tokenizer: bytes, world, a tokenizer.json or a folder with one, or owner/name on the Hugging Face hub.
        segment_length: tokens T of one forward of the model.
        segments_per_window: segments under one gradient; document: as many as the longest document of the window needs.
        batch_size: lanes on each device; with parallel.time, on each group of devices that share documents.
        validation: a share of the documents, a count of them, a source of its own, or null.
        parallel: how one document is spread over ranks: the section `parallel` of a recipe.
    """

    trainer: pl.Trainer

    def __init__(
        self,
        source: Source | list[Source],
        path: str,
        tokenizer: str = "bytes",
        segment_length: int = 512,
        segments_per_window: int | Literal["document"] = "document",
        batch_size: int = 1,
        validation: int | float | Source | None = None,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        sizes = {"segment_length": segment_length, "segments_per_window": segments_per_window, "batch_size": batch_size}
        for key, value in sizes.items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"data.{key} must be at least 1, got {value}")
        self.sources = listed(source)
        self.weights = [x.weight for x in self.sources]
        if isinstance(validation, Source) and validation.weight != 1:
            raise ValueError("data.validation.weight: each held-out document is read once: leave it out")
        self.path, self.tokenizer, self.validation = path, load_tokenizer(tokenizer), validation
        self.segment_length, self.batch_size, self.parallel = segment_length, batch_size, parallel
        self.segments_per_window = None if segments_per_window == "document" else int(segments_per_window)
        self.plan = lru_cache(maxsize=2)(self._plan)
        self._windows = lru_cache(maxsize=None)(lambda epoch: len(self.plan(epoch)))  # asked for more than once
        self.seed = 0
        self.train: ArrowDocuments
        self.held_out: ArrowDocuments | None = None

    def prepare_data(self) -> None:
        """Tokenise what is missing or stale; Lightning calls it on one rank of each machine."""
        prepare(self.sources, self.tokenizer, self.path)
        if isinstance(self.validation, Source):
            prepare(self.validation, self.tokenizer, f"{self.path}/validation")

    def setup(self, stage: str) -> None:
        """Open the prepared documents and split them."""
        documents = ArrowDocuments.open(self.path)
        if len(documents.names) != len(self.sources):
            raise ValueError(f"data.path {self.path} holds documents of {len(documents.names)} sources, data.source "
                             f"names {len(self.sources)}: run `infctx prepare` again")  # fmt: skip
        if isinstance(self.validation, Source):
            self.train, self.held_out = documents, ArrowDocuments.open(f"{self.path}/validation")
        elif self.validation:
            if self.validation < 0:
                raise ValueError(f"data.validation must be a share or a count of documents, got {self.validation}")
            count = self.validation if isinstance(self.validation, int) else round(self.validation * len(documents))
            count = max(1, int(count))
            if count >= len(documents):
                raise ValueError(
                    f"data.validation takes {count} of {len(documents)} documents: none is left to learn from"
                )
            order = np.random.default_rng(0).permutation(len(documents))
            self.train = documents.subset(np.sort(order[count:]))
            self.held_out = documents.subset(np.sort(order[:count]))
        else:
            self.train = documents
        self.plan.cache_clear()
        self._windows.cache_clear()

    @property
    def lanes(self) -> int:
        """G: the lanes of all ranks. Those that share a document share lanes."""
        return self.batch_size * self.parallel.lane_groups(self.trainer.world_size)

    def train_dataloader(self) -> WindowLoader:
        """The windows of the epoch that the trainer is in."""
        same = {"digest": self.train.digest, "lanes": self.lanes, "seed": self.seed, "documents": len(self.train),
                "segment_length": self.segment_length, "segments_per_window": self.segments_per_window,
                "source.weight": None if self._chosen(0) is None else self.weights}  # fmt: skip
        accumulate = self.trainer.accumulate_grad_batches
        identity = {f"data.{key}": x for key, x in same.items()} | {"trainer.accumulate_grad_batches": accumulate}
        epoch = self.trainer.current_epoch
        limit, sources = self._limit(epoch), _sources(self.train)
        return WindowLoader(self.train, self.plan, self._own(), accumulate, epoch, identity, limit, sources)

    def val_dataloader(self) -> WindowLoader | list[Any]:
        """The held-out documents, always in the same order."""
        if self.held_out is None:
            return []
        held_out = self.held_out
        plan = Plan(held_out.inputs, self.lanes, self.segment_length, self.segments_per_window, 0, 0)
        return WindowLoader(held_out, lambda _: plan, self._own(), 1, 0, {}, sources=_sources(held_out))

    def transfer_batch_to_device(self, batch: Window, device: torch.device, dataloader_idx: int) -> Window:
        """Windows stay on the host: each segment goes to the device when it is run."""
        return batch

    def windows_in(self, epoch: int) -> int:
        """Windows of an epoch."""
        windows, limit = self._windows(epoch), self._limit(epoch)
        return windows if limit is None else min(windows, limit)

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.windows_in(epoch) // self.trainer.accumulate_grad_batches)

    @property
    def _alike(self) -> bool:
        """Whether epochs are of as many windows: numbered ones of the same documents; whole ones fall differently."""
        return self.segments_per_window is not None and all(float(x).is_integer() for x in self.weights)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run. Raises: ValueError if the recipe sets no end."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        if epochs is None or epochs < 0:
            if steps < 0:
                raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
            return steps
        every = [0] * epochs if self._alike else range(epochs)
        total = 0
        for epoch in every:
            total += self.steps_in(epoch)
            if 0 <= steps <= total:
                return steps
        return total

    def course(self, unit: Literal["steps", "tokens"]) -> Sequence[int]:
        """(steps + 1,) how far the run is before each optimizer step, and at its end; tokens are those of all ranks.

        Tokens take the plan of every epoch, and are the same on every rank and in every run that goes on.
        Raises: ValueError if the recipe sets no end.
        """
        total = self.total_steps()
        if unit == "steps":
            return range(total + 1)
        course, epoch = [0], 0
        while len(course) <= total:
            windows, step = self.windows_in(epoch), self.trainer.accumulate_grad_batches
            if not windows:
                raise ValueError(f"trainer.limit_train_batches leaves no window of epoch {epoch}: raise it")
            read = self.plan(epoch).read[[*range(step, windows, step), windows]]
            course, epoch = course + (course[-1] + read).tolist(), epoch + 1
        return course[: total + 1]

    def total_tokens(self) -> tuple[int, int]:
        """Tokens that the run will have read at its end, and documents it will have begun, on all ranks."""
        left, epoch, tokens, documents = self.total_steps(), 0, 0, 0
        whole = self._alike and self._limit(0) is None  # every epoch but a last one that is cut off
        while left > 0:
            at = 0 if whole and left >= self.steps_in(0) else epoch
            plan, windows = self.plan(at), min(left * self.trainer.accumulate_grad_batches, self.windows_in(at))
            if not windows:
                break  # Lightning ends the run there
            tokens, documents = tokens + int(plan.read[windows]), documents + plan.begun(windows)
            left, epoch = left - self.steps_in(at), epoch + 1
        return tokens, documents

    def lengths(self, epoch: int) -> np.ndarray:
        """Input tokens of each document that an epoch reads, as often as it reads it."""
        return self.train.inputs[self.rows(epoch)]

    def rows(self, epoch: int) -> np.ndarray:
        """The documents that an epoch reads, as often as it reads them."""
        rows = self._chosen(epoch)
        return np.arange(len(self.train)) if rows is None else rows

    def describe(self, horizon: int | None) -> str:
        """What an epoch is made of, in a few lines for the log."""
        plan, d = self.plan(0), self.train
        tokens, windows, steps = int(d.inputs.sum()), len(plan), self.steps_in(0)
        cut = plan.cut(horizon)
        mend = "; none, with data.segments_per_window: document" if cut and horizon is None else ""
        return (
            f"data: {len(d):,} documents, {tokens:,} tokens ({int(d.supervised.sum()):,} supervised), "
            f"longest {int(d.inputs.max()):,}; left out, without a target: {d.left_out:,}; "
            f"held out: {len(self.held_out or ()):,}\n"
            f"plan: {self.lanes} lanes, {windows:,} windows and {steps:,} optimizer steps an epoch, "
            f"{plan.tokens / steps:,.0f} tokens a step; padding {plan.padding:.2%}; "
            f"tokens whose gradient is cut before their document begins: {cut:.2%}{mend}"
        )

    def _plan(self, epoch: int) -> Plan:
        shape = (self.lanes, self.segment_length, self.segments_per_window)
        return Plan(self.train.inputs, *shape, self.seed, epoch, self._chosen(epoch))

    def _chosen(self, epoch: int) -> np.ndarray | None:
        return chosen(self.train.source, self.weights, epoch)

    def _limit(self, epoch: int) -> int | None:
        limit = self.trainer.limit_train_batches
        return limit if isinstance(limit, int) else None if limit == 1.0 else int(len(self.plan(epoch)) * limit)

    def _own(self) -> range:
        group = self.trainer.global_rank // self.parallel.time
        return range(group * self.batch_size, (group + 1) * self.batch_size)


def _sources(documents: ArrowDocuments) -> Sources:
    return Sources(torch.from_numpy(documents.source), len(documents.names))
