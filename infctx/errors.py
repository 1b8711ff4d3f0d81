"""Errors that the user can mend, and parsers that say them in a line."""

import re
from pathlib import Path
from typing import NoReturn

import yaml

# What jsonargparse says of the types that a value was not meant to be.
VAGUE = re.compile(r"NoneType|^Expected a (<class 'list'>|list|path but.*|<class 'str'>|str)$")


class UserError(ValueError):
    """Shown without a traceback."""


class ShortErrors:
    """Mixed into a parser of options: an error is a line, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises: UserError, always."""
        raise UserError(in_a_line(message))


def in_a_line(message: str) -> str:
    """What is wrong, where a value could be of several types: jsonargparse tells of each type in many lines."""
    told = _of_union(message) if "Union subtypes" in message else message
    return re.sub(r"<class '([^']+)'>|typing\.(?=\w)", r"\1", told)


def _of_union(message: str) -> str:
    keys = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message))
    reasons = dict.fromkeys(re.findall(r"Option '\S+' is not accepted|(?:[\w.]+: )?Expected a .*", message))
    if not (keys and reasons):  # a constructor's own words
        listed = message.split("Errors:")[-1].split("Given value type:")[0]
        own = [" ".join(x.split()) for x in re.split(r"^\s*- ", listed, flags=re.MULTILINE)]
        return ": ".join([*keys, ([x for x in own if x and not VAGUE.search(x)] or own)[-1]])
    unknown = [x for x in reasons if x.startswith("Option")]
    found = [x for x in reasons if not VAGUE.search(x)] or list(reasons)
    given = re.findall(r"Given value: (.*)", message)
    told = unknown or "Got value" in message or any("; got " in x for x in found)
    got = "" if told or not given else f"; got {given[0][:80]}"
    inner = not found[0].startswith("Expected") and not unknown  # told in a line before, of a key inside this one
    return f"{'.'.join(keys)}{'.' if inner else ': '}{' or '.join(unknown or found)}{got}"


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
