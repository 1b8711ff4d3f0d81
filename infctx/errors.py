"""Errors that the user can mend, and parsers that say them in a line."""

from pathlib import Path
from typing import NoReturn

import yaml


class UserError(ValueError):
    """Shown without a traceback."""


class ShortErrors:
    """Mixed into a parser of options: an error is a line, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises: UserError, always."""
        raise UserError(message)


def require_yaml(argv: list[str]) -> None:
    """Raises: UserError that names the recipe and the line that is no YAML, which the parser of options does not."""
    flags = [i for i, x in enumerate(argv[:-1]) if x in ("-c", "--config")]
    for file in [argv[i + 1] for i in flags] + [x.split("=", 1)[1] for x in argv if x.startswith("--config=")]:
        try:
            recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UserError(f"{file}{place}: no plain YAML: {getattr(error, 'problem', error)}") from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8") from None
        if not isinstance(recipe, dict):
            raise UserError(f"{file}: a recipe is keys and values, found {type(recipe).__name__}")
