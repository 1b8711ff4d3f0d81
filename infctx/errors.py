"""Errors that the user can mend, and parsers that say them in a line."""

import re
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml

# What jsonargparse says of the types that a value was not meant to be.
VAGUE = re.compile(r"NoneType|^Expected a (<class 'list'>|list|path but.*|<class 'str'>|str)$")


INNER = re.compile(r"([\w.]+): Option '(\w+)' is not accepted")
UNKNOWN = re.compile(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)")


class UserError(ValueError):
    """Shown without a traceback."""


class ShortErrors:
    """Mixed into a parser of options: an error is a line, not a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises: UserError, always."""
        told = in_a_line(message)
        if missing := re.search(r"are required: ((?:\w+\.)+.*)", told):
            keys = [x.split(".", 1)[1] for x in missing[1].split(", ")]  # without the verb
            are, them, these = ("are", "them", "these keys") if len(keys) > 1 else ("is", "it", "this key")
            told = f"{' and '.join(keys)} {are} missing: give a recipe with -c that has {them}, or {these}"
        elif inner := INNER.fullmatch(told):
            names = [x.rsplit(".", 1)[1] for x in _options(self) if x.startswith(f"{inner[1]}.")]
            alike = get_close_matches(inner[2], names, 1) if len(inner[2]) > 1 else []  # many are near to one letter
            told += f"; did you mean {inner[1]}.{alike[0]}?" if alike else f"; --{inner[1]}.help lists them"
        elif unknown := UNKNOWN.search(told):
            told = _no_such(unknown[1] or unknown[2], list(_options(self)))
        raise UserError(told)


def told_of(error: BaseException) -> str:
    """What an error says, in plain words; one of the system names the file first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    told = re.sub(r'^Parser key "([^"]+)":\s+', r"\1: ", in_a_line(str(error)))
    told = re.sub(r"Expected a dot import path string.*?(?=; got|$)", "expected keys and values, {key: value}", told)
    told = re.sub(r"Literal\[([^\]]*)\]", lambda found: _either(found[1].split(", ")), told)
    told = (
        re.sub(r"Expected an? ", "expected ", told).replace(" or expected ", " or ").replace(". Got value: ", "; got ")
    )
    return re.sub(r"Option ('\S+') is not accepted", r"there is no key \1", told)


def in_a_line(message: str) -> str:
    """What is wrong, where a value could be of several types: jsonargparse tells of each type in many lines."""
    told = _of_union(message) if "Union subtypes" in message else message
    return re.sub(r"<class '([^']+)'>|typing\.(?=\w)", r"\1", told)


def _either(values: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def _options(parser: Any) -> Iterator[str]:
    """The names of a parser's options, and of its verbs'."""
    for action in parser._actions:
        names = [x[2:] for x in action.option_strings if x.startswith("--")]
        yield from names
        inner = {x.name: None for kind in _dataclasses(getattr(action, "_typehint", None)) for x in fields(kind)}
        yield from (f"{name}.{x}" for name in names for x in inner)
        for verb in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            yield from _options(verb)


def _dataclasses(kind: Any) -> Iterator[Any]:
    """Those that a value of a type may be: of T | list[T] | None it is T."""
    if is_dataclass(kind):
        yield kind
    for inner in get_args(kind):
        yield from _dataclasses(inner)


def _no_such(key: str, options: list[str]) -> str:
    """Of a key that is not there, and the nearest one: of those that end in the same word, wherever, or of all."""
    last = key.rsplit(".", 1)[-1]
    same = [x for x in options if x.rsplit(".", 1)[-1] == last]
    alike = get_close_matches(key, same, 1, 0) or get_close_matches(key, options, 1)
    return f"{key}: there is no such key; " + (f"did you mean {alike[0]}?" if alike else "--help lists them")


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
            recipe = yaml.load(Path(file).read_text(encoding="utf-8"), _Plain)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UserError(f"{file}{place}: no plain YAML: {getattr(error, 'problem', error)}") from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8: name a recipe, a text file in YAML") from None
        if not isinstance(recipe, dict):
            found = "nothing" if recipe is None else type(recipe).__name__
            raise UserError(f"{file}: a recipe is keys and values, found {found}")


class _Plain(yaml.SafeLoader):
    """As YAML says, a key is there once: of two, the parser of options would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raises: ComposerError for a key given twice."""
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)
