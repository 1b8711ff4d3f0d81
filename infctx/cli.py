"""The commands: a table. Those that take a recipe are in `recipe`; the rest are the functions below."""

import logging
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Literal

from jsonargparse import ArgumentParser, auto_cli

from infctx.checkpoint import load_model, save_model
from infctx.errors import ShortErrors, UserError
from infctx.generate import sample
from infctx.report import write_report
from infctx.tokenizer import load_tokenizer


class Parser(ShortErrors, ArgumentParser):
    """jsonargparse's, with short errors."""


def export(run: str, out: str, what: Literal["model"] = "model") -> None:
    """Write the weights of a run or of one of its checkpoints to a file that other software reads.

    Args:
        run: run folder (its newest sound checkpoint) or checkpoint folder.
        out: file to write: .pth or .safetensors.
        what: model: all weights.
    """
    save_model(load_model(run), out)
    print(f"{what}: {out}")


def generate(
    model: str, prompt: str = "", max_tokens: int = 256, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0,
    tokenizer: str = "bytes",
) -> None:  # fmt: skip
    """Print a text and what the model makes follow it.

    Args:
        model: weights: .pth, .safetensors, checkpoint or run folder.
        prompt: the beginning.
        max_tokens: at most this many tokens follow.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the fewest tokens that hold this probability.
        seed: of the draws.
        tokenizer: bytes.
    """
    words, net = load_tokenizer(tokenizer), load_model(model)
    if net.config.vocab_size < words.vocab_size:
        raise ValueError(f"tokenizer {tokenizer} has {words.vocab_size} ids, the model only {net.config.vocab_size}")
    ids = sample(
        net, [int(i) for i in words.encode(prompt)], max_tokens, temperature, top_p, seed, None, words.vocab_size
    )
    first = next(ids, None)  # errors come before the prompt is repeated
    print(prompt, end="", flush=True)
    for piece in words.stream(chain([] if first is None else [first], ids)):
        print(piece, end="", flush=True)
    print()


def report(run: str) -> None:
    """Draw the figures of a run into one HTML page.

    Args:
        run: run folder.
    """
    print(f"report: {write_report(run)}")


RECIPE_COMMANDS = {
    "fit": "Train by a recipe: -c recipe.yaml, and any of its keys as an option.",
    "validate": "Print the loss over held-out documents.",
    "prepare": "Tokenise the documents of a recipe.",
}
COMMANDS: dict[str, Callable[..., None]] = {"export": export, "generate": generate, "report": report}


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
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        lines = [line for line in str(error).splitlines() if line.strip()][:4] or [type(error).__name__]
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
                    ".*across ranks is zero.*", ".*treespec.*", ".*GPU available but not used.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)
