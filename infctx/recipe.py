"""The commands that take a recipe: LightningCLI on the constructors, nothing else."""

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from infctx.borders import StatesConfig
from infctx.changes import changed, config_of
from infctx.checkpoint import checkpoints, newest, verify
from infctx.data import DocumentData
from infctx.errors import ShortErrors, UserError, require_yaml
from infctx.parallel.config import ParallelConfig
from infctx.parallel.launch import cluster_plugins, decide_once, require_world
from infctx.parallel.watch import Watch
from infctx.planning import data_of, note_plan, spell_out
from infctx.refusals import refuse_precision, refuse_strategy
from infctx.report import write_report
from infctx.run import Checkpoint, FolderCheckpoints, Metrics, Progress, at_its_end, read_end
from infctx.snapshots import Snapshots
from infctx.stopping import Stopping
from infctx.training import InfctxModule
from infctx.verbs import READERS, Trainer

# The sampler that Lightning would add shuffles; the plan of each epoch has its own length.
TRAINER = {
    "use_distributed_sampler": False,
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
}

# What lists the keys of a section that may be of several types; jsonargparse wants to be told of which one.
CLASSES = {"--data.source.help": "infctx.sources.Source", "--model.tuning.help": "infctx.tuning.config.Tuning"}


class Parser(ShortErrors, LightningArgumentParser):
    """Lightning's, with short errors."""


class SaveConfig(SaveConfigCallback):
    """The recipe as resolved, in the run's folder; of one that goes on, once it does: what is refused changes none."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save that of a new run."""
        if stage == "fit" and _checkpoint(trainer).resume is None:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save that of a run that goes on."""
        if _checkpoint(trainer).resume is not None:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write config.yaml, and tell what it changes; Lightning calls it on the first rank."""
        checkpoint = _checkpoint(trainer)
        checkpoint.folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        config.name = config.resume = None  # another run by this recipe is another run
        path = checkpoint.folder / "config.yaml"
        if checkpoint.resume is not None:
            old, new = config_of(checkpoint.resume), yaml.safe_load(self.parser.dump(config, skip_none=False))
            if isinstance(old, dict) and (changes := changed(old, new)):
                print(f"changed since: {', '.join(changes)}")
        self.parser.save(config, path, skip_none=False, overwrite=True, multifile=False)


class CLI(LightningCLI):
    """Verbs of a recipe: everything they take is a constructor's argument, a key of the recipe."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs, and which arguments of the trainer's methods are no options."""
        loaders = {
            "model",
            "dataloaders",
            "train_dataloaders",
            "val_dataloaders",
            "datamodule",
            "ckpt_path",
            "weights_only",
        }
        others = dict.fromkeys(("prepare", *READERS), loaders)
        return {"fit": loaders, "validate": loaders | {"verbose"}, **others}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The file that a run leaves says only what was asked for."""
        return super().init_parser(**{**kwargs, "dump_header": None})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is neither model, data nor trainer."""
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_class_arguments(ParallelConfig, "parallel")
        parser.add_class_arguments(StatesConfig, "states")
        for source, target in (("parallel", "model"), ("parallel", "data"), ("states", "model")):
            parser.link_arguments(source, f"{target}.{source}", apply_on="instantiate")
        help_name = "of the run's folder under runs/, or a path if it holds a slash; default: the recipe's and the time"
        parser.add_argument("--name", type=str | None, default=None, help=help_name)
        help_resume = "auto: from the newest sound checkpoint of --name, if any; or a checkpoint's folder"
        parser.add_argument("--resume", type=str | None, default=None, help=help_resume)

    def before_instantiate_classes(self) -> None:
        """Decide what run this is, before anything is built or written."""
        config = self.config[self.subcommand]
        if self.subcommand == "prepare":
            _prepare(config.data)
            raise SystemExit(0)
        if self.subcommand in READERS:
            READERS[self.subcommand](config)
            raise SystemExit(0)
        if self.subcommand == "validate" and (config.name or config.resume):
            raise UserError("validate takes no --name and no --resume: name the run by --model.load")
        strategy = getattr(config.trainer.strategy, "class_path", config.trainer.strategy)
        if str(strategy).startswith(("deepspeed", "fsdp")):  # here, since Lightning's own want a GPU first
            refuse_strategy(strategy)
        refuse_precision(config.trainer.precision)  # here, since Lightning itself would take another one on a CPU
        if self.subcommand == "fit":
            self.run_folder, self.resume = decide_once(lambda: _decide(config), config.parallel.timeout)
            if getattr(rank_zero_only, "rank", 0) == 0:
                print(f"run: {self.run_folder}" + (f", resumed from {self.resume}" if self.resume else ""))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add what a run writes."""
        given = self._get(self.config_init, "trainer")
        plugins = given["plugins"] if isinstance(given["plugins"], list) else [given["plugins"]]
        plugins = [*filter(None, plugins), FolderCheckpoints()]
        own: dict[str, Any] = {"plugins": [*plugins, *cluster_plugins(plugins)], "logger": False}
        own["callbacks"] = [*(given["callbacks"] or []), Watch(self._get(self.config_init, "parallel").timeout)]
        if self.subcommand == "fit":
            metrics = Metrics(self.run_folder)
            checkpoint = self._get(self.config_init, "checkpoint")
            checkpoint.folder, checkpoint.resume = self.run_folder, self.resume
            checkpoint.limits = [given["max_epochs"], given["max_steps"]]
            bar = [] if given["enable_progress_bar"] is False else [Progress(metrics)]
            own["callbacks"] += [metrics, Stopping(), Snapshots(self.run_folder), *bar]
            if given["logger"] in (None, True):
                own["logger"] = TensorBoardLogger(self.run_folder, name="", version="tensorboard")
            else:
                own["logger"] = given["logger"]
        trainer = super().instantiate_trainer(**own, **kwargs)
        require_world(trainer.world_size)
        return trainer

    def after_instantiate_classes(self) -> None:
        """One seed for the order of documents and the rest."""
        self.datamodule.seed = int(self.config[self.subcommand].seed_everything)

    def fit(self, **kwargs: Any) -> None:
        """Train, and write the report. Raises: SystemExit 130, as shells have it, where Control-C stopped the run."""
        try:
            self.trainer.fit(**kwargs, ckpt_path=self.resume, weights_only=True)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise UserError(
                f"{self.resume}: its weights are not those of model.init, model.load and model.tuning: give what it had"
            ) from None
        if self.trainer.is_global_zero and not (self.run_folder / "metrics.jsonl").exists():
            print(f"run: {self.resume} is where the run ends; nothing to do")
        elif self.trainer.is_global_zero:
            device, seconds = self.trainer.strategy.root_device, self.model.counts["seconds"]
            note_plan(self.run_folder, self.trainer.world_size, device, seconds)
            self._report()
        if self.model.stops and not at_its_end(self.trainer):
            if self.trainer.is_global_zero:
                print(f"run: stopped at step {self.trainer.global_step}, saved; --resume auto goes on")
            raise SystemExit(130)

    def _report(self) -> None:
        try:
            print(f"report: {write_report(self.run_folder)}")
        except Exception as error:  # the run is what counts
            print(f"report: not written, {error}; `infctx report {self.run_folder}` tries again")

    def validate(self, **kwargs: Any) -> None:
        """The loss over the held-out documents."""
        if not self.config.validate.data.validation:
            raise ValueError("data.validation is null: there is nothing to validate on")
        self.trainer.validate(**kwargs, verbose=False)
        if self.trainer.is_global_zero:
            print(f"validation_loss: {float(self.trainer.callback_metrics['validation_loss']):.6f} nats per token")


def _checkpoint(trainer: pl.Trainer) -> Checkpoint:
    return next(x for x in trainer.callbacks if isinstance(x, Checkpoint))  # type: ignore[attr-defined]


def _decide(config: Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint it goes on from. Ranks that Lightning starts are told both in sys.argv."""
    name, resume = config.name, config.resume
    if resume not in (None, "auto"):
        resume = Path(resume) if checkpoints(resume) == [] else newest(resume)
        verify(resume)
        if name is None and resume.absolute().parent.name != "checkpoints":
            raise UserError(f"--resume {resume}: it lies in no run's folder: give the run's --name")
        name = name or str(resume.absolute().parent.parent)
    if resume == "auto" and not name:
        raise UserError("--resume auto: give the run's --name")
    if not name:
        recipe = Path(str(config.config[-1])).stem if config.config else "run"
        name = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(name) if "/" in name else Path("runs", name)
    if getattr(rank_zero_only, "rank", 0) != 0:
        return folder, resume
    if resume == "auto":
        resume = newest(folder) if checkpoints(folder) else None
        if resume is None and (folder / "metrics.jsonl").exists():
            print(f"run: {folder} has no checkpoint yet: begins anew")
        if resume and read_end(folder) == [int(resume.name[5:]), config.trainer.max_epochs, config.trainer.max_steps]:
            print(f"run: {folder} has ended, at {resume.name}; nothing to do")
            raise SystemExit(0)
    elif resume is None and (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} holds a run already: give another --name, or --resume auto to go on with it")
    sys.argv += [f"--name={folder.absolute()}", f"--resume={resume.absolute() if resume else 'null'}"]
    return folder, resume


def _prepare(config: Namespace) -> None:
    data_of(config).prepare_data()


def run_recipe(argv: list[str]) -> None:
    """Run a verb of RECIPE_COMMANDS. Raises: UserError and what the constructors raise."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they set their own levels when imported
        logging.getLogger(name).setLevel(logging.WARNING)
    require_yaml(argv)
    argv = [part for x in argv for part in ((x, CLASSES[x]) if x in CLASSES else (x,))]
    try:
        _run(spell_out(argv) if argv[0] in READERS else argv)
    except MisconfigurationException as error:
        none = re.search("No supported .* backend found|accelerator is not available", str(error))
        mend = " Choose trainer.accelerator cpu; for a GPU install torch for CUDA" if none else ""
        raise UserError(f"trainer: {error}{mend}") from error
    except SIGTERMException:
        raise SystemExit(143) from None  # Lightning's own would say that all went well


def _run(argv: list[str]) -> None:
    class One(CLI):
        """With the verb that is asked for alone: each takes a fifth of a second to set up."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {argv[0]: CLI.subcommands()[argv[0]]}

    One(
        InfctxModule,
        DocumentData,
        trainer_class=Trainer,
        parser_class=Parser,
        args=argv,
        trainer_defaults=TRAINER,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
    )
