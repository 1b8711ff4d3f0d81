"""The verbs that read a recipe but train nothing."""

import lightning.pytorch as pl

from infctx.check import check_recipe
from infctx.planning import plan_recipe
from infctx.preview import preview_recipe

READERS = {"plan": plan_recipe, "check": check_recipe, "preview": preview_recipe}  # verbs that build no model


class Trainer(pl.Trainer):
    """Lightning's, with the verbs that read a recipe but train nothing."""

    def prepare(
        self, model: pl.LightningModule | None = None, datamodule: pl.LightningDataModule | None = None
    ) -> None:
        """Tokenise the documents of a recipe into data.path, unless that is done."""

    def plan(
        self, model: pl.LightningModule | None = None, datamodule: pl.LightningDataModule | None = None,
        device: str = "measured", ranks: list[int] = [], explain: bool = False, tokens: int | None = None,  # noqa: B006
    ) -> None:  # fmt: skip
        """Forecast memory, time and what would fit, for each strategy and number of ranks.

        Args:
            device: what each rank has: measured (this machine), or h200, h100, a100-80, ...: see devices.py.
            ranks: numbers of ranks: --ranks 1 2 4; 1, 2, 4 and 8 times parallel.time if left out.
            explain: print the formulas too, with the numbers put in.
            tokens: of the longest document, where nothing is prepared yet.
        """

    def check(
        self, model: pl.LightningModule | None = None, datamodule: pl.LightningDataModule | None = None,
        ranks: list[int] = [],  # noqa: B006
    ) -> None:  # fmt: skip
        """Dry-run a recipe for a number of ranks on this machine: nothing is prepared, started or written.

        Args:
            ranks: how many: --ranks 8; 1 if left out.
        """

    def preview(
        self, model: pl.LightningModule | None = None, datamodule: pl.LightningDataModule | None = None,
        documents: int = 4, first: int | None = None, html: str | None = None,
    ) -> None:  # fmt: skip
        """Show documents as the model will see them, and what was prepared, how long they are, how they are cut.

        Args:
            documents: how many to show, or parts of them, as they lie in the first windows; 0: none.
            first: show whole documents instead, from this number on, as errors of a run name them.
            html: file for the same as a page.
        """
