"""The commands: a table. Those that take a recipe are in `recipe`; the rest are the functions below."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser, auto_cli

from infctx.commands import chat, generate
from infctx.convert import convert, export_adapter, init, merge, require_new
from infctx.errors import ShortErrors, UserError, told_of
from infctx.report import lacks_plan, write_report
from infctx.tuning.states import export_state
from infctx.upstream import convert_recipe
from infctx.weights import load_model, save_model


class Parser(ShortErrors, ArgumentParser):
    """jsonargparse's, with short errors, and switches that take no value: --think, --no_think."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """As jsonargparse's."""
        if options.get("type") is bool:
            options = {k: v for k, v in options.items() if k != "type"} | {"action": ActionYesNo}
        return super().add_argument(*names, **options)


def export(run: str, out: str, what: Literal["model", "state", "adapter"] = "model") -> None:
    """Write what a run or one of its checkpoints has learnt to a file that other software reads.

    Args:
        run: run folder (its newest sound checkpoint) or checkpoint folder.
        out: file to write: .pth or .safetensors; a name without suffix: a folder for Hugging Face's software.
        what: model: all weights, adapters merged, with a learnt initial state among them; state: that state alone, as a
            state file; adapter: the adapters alone, as a folder of the peft library.
    """
    require_new(out)
    if what == "adapter":
        export_adapter(run, out)
    elif what == "state":
        export_state(load_model(run), out)
    else:
        save_model(load_model(run), out)
    print(f"{what}: {out}")


def report(run: str) -> None:
    """Draw the figures of a run into one HTML page.

    Args:
        run: run folder.
    """
    if lacks_plan(run):
        from infctx.planning import plan_again  # Lightning takes seconds to import

        plan_again(Path(run))
    print(f"report: {write_report(run)}")


RECIPE_COMMANDS = {
    "fit": "Train by a recipe: -c recipe.yaml, and any of its keys as an option.",
    "validate": "Print the loss over held-out documents.",
    "prepare": "Tokenise the documents of a recipe.",
    "preview": "Show documents as the model will see them, and what a recipe trains on.",
    "plan": "Forecast memory and time by a recipe, for each strategy and number of ranks.",
    "check": "Dry-run a recipe for N ranks on this machine.",
}
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "convert": convert,
    "convert-recipe": convert_recipe,
    "export": export,
    "merge": merge,
    "generate": generate,
    "chat": chat,
    "report": report,
}


def main(argv: list[str] | None = None) -> None:
    """Run a command line. Errors that a user can mend are at most five lines; --debug shows where they came from."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [x for x in argv if x != "--debug"]
    _quiet()
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
        elif argv[0] in COMMANDS:
            auto_cli(COMMANDS[argv[0]], args=argv[1:], parser_class=Parser, prog=f"infctx {argv[0]}")
        elif argv[0] in RECIPE_COMMANDS:
            from infctx.recipe import run_recipe  # Lightning takes seconds to import

            run_recipe(argv)
        else:
            raise UserError(f"there is no command {argv[0]!r}; there are: {', '.join(RECIPE_COMMANDS | COMMANDS)}")
    except BrokenPipeError:  # whoever read the output has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123, for what Python flushes at its end
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        lines = [line for line in told_of(error).splitlines() if line.strip()][:4] or [type(error).__name__]
        print(f"infctx: error: {lines[0]}", *lines[1:], sep="\n", file=sys.stderr)
        raise SystemExit(2) from None


def _overview() -> str:
    rows = RECIPE_COMMANDS | {name: (f.__doc__ or "").splitlines()[0] for name, f in COMMANDS.items()}
    return "\n".join(
        ["infctx COMMAND ..., and COMMAND --help for its options", *(f"  {k:9} {v}" for k, v in rows.items())]
    )


def _quiet() -> None:
    """Show our own log, and leave out what a user can do nothing about."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("infctx").setLevel(logging.INFO)
    for message in (".*does not have many workers.*", ".*args parameter is intended.*", ".*smaller than the logging.*",
                    ".*across ranks is zero.*", ".*treespec.*", ".*GPU available but not used.*",
                    ".*(all_gather|reduce_scatter).* is deprecated.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    """Peft imports bitsandbytes, which warns that a faster kernel for 4 bits is not there; nothing here has 4 bits."""
    return "gemm_4bit_forward" not in str(record.msg)
