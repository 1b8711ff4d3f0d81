"""Where documents come from, as a recipe says it: files or a data set, what a record holds, how much of it is read."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from glob import glob
from pathlib import Path
from typing import Any, Literal

import numpy as np

HUB = "hf:"  # how a path begins that names a data set of Hugging Face
PREPARED = re.compile(r"([0-9a-f]{16}\.arrow|prepared\.json)(\.part)?")  # files of prepared documents
COLUMNS = {"completion": ("prompt", "completion"), "instruction": ("instruction", "input", "output")}
AFFIXES = {  # prefix and suffix of each column
    "completion": (("", ""), ("", "")),
    "instruction": (("Instruction: ", "Input: ", "Response: "), ("\n\n", "\n\n", "")),
}
_TEXTS = frozenset({"columns", "prefix", "suffix", "learn", "learn_prefix"})
# how data sets call a role -> how a template does
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
# format -> the settings that mean something to it, beside those of every format; `module:function` takes none.
OPTIONS = {
    "text": frozenset({"column"}),
    "jsonl": frozenset({"column"}),
    "completion": _TEXTS,
    "instruction": _TEXTS,
    "messages": frozenset({"column", "template", "learn", "learn_prefix"}),
    "binidx": frozenset(),
}


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    The kind of a file is told by its suffix: .jsonl .ndjson .json .csv .tsv .parquet .arrow hold records, any other is
    text; each also as .gz .bz2 .xz .zst. A folder that `datasets` saved holds records too.

    Args:
        path: a file, a folder (all files in it), a pattern such as books/*.txt, or hf:owner/name.
        format: text: a file is a document, or a column of each record; auto: the same, but of a file of records a
            column must be named; jsonl: a line is a document, whatever the suffix; completion: a prompt and what
            follows it; instruction: columns with prefixes; messages: a conversation; binidx: tokens as they are;
            module:function: your own, (record, tokenizer) -> Document.
        column: text, jsonl: the one that holds the text; messages: the conversation (messages or conversations).
        columns: completion, instruction: the columns, in order; an empty or null one is left out with its prefix.
        prefix: completion, instruction: text before each column; a space that ends one is learnt with the word after.
        suffix: completion, instruction: text after each column.
        template: messages: world, chatml, or tokenizer: the tokenizer's own chat template, through transformers.
        learn: columns or roles to be learnt; left out: the last column, the assistant.
        learn_prefix: also learn the prefixes of what is learnt.
        key: json: the key of the list of records, where they are not the file itself.
        split: of a data set by name (left out: train), or of a folder that holds several.
        subset: of a data set by name.
        name: what reports call it; left out: the path.
        weight: how often an epoch reads each document; 0.5: one half in one epoch, the other half in the next.
        limit: at most this many documents, the first ones.
        min_tokens: shorter documents are dropped.
        max_tokens: of a document, with its end; longer ones are treated as too_long says.
        too_long: refuse: an error; drop; split: into documents that each begin with the last token of the one before,
            so that each token is a target once. Each of them begins without memory of the one before.
    """

    path: str
    format: str = "auto"
    column: str | None = None
    columns: list[str] | None = None
    prefix: list[str] | None = None
    suffix: list[str] | None = None
    template: Literal["world", "chatml", "tokenizer"] | None = None
    learn: list[str] | None = None
    learn_prefix: bool = False
    key: str | None = None
    split: str | None = None
    subset: str | None = None
    name: str | None = None
    weight: float = 1.0
    limit: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    too_long: Literal["refuse", "drop", "split"] = "refuse"
    told: bool = field(default=True, init=False, repr=False, compare=False)  # whether the format was

    def __post_init__(self) -> None:
        if self.format == "auto":
            object.__setattr__(self, "format", "text")
            object.__setattr__(self, "told", False)
        if self.format not in OPTIONS and not self.callable:
            choices = f"{', '.join(OPTIONS)}, or your own as module:function"
            raise ValueError(f"data.source.format {self.format!r} is not known; choose one of: {choices}")
        for option in sorted(frozenset().union(*OPTIONS.values()) - OPTIONS.get(self.format, frozenset())):
            if getattr(self, option) not in (None, False):
                raise ValueError(f"data.source.{option} means nothing to format {self.format}: leave it out")
        if self.is_hub and self.format == "binidx":
            raise ValueError("data.source.format binidx is for pairs of files: give data.source.path of one")
        self._check_numbers()
        self._check_columns()

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"data.source.weight must be more than 0, got {self.weight}: leave out the source instead")
        for key, least in (("limit", 1), ("min_tokens", 1), ("max_tokens", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"data.source.{key} must be at least {least}, got {value}")
        if self.too_long != "refuse" and self.max_tokens is None:
            raise ValueError(f"data.source.too_long is {self.too_long}: set data.source.max_tokens, or leave it out")
        if (self.min_tokens or 0) > (self.max_tokens or math.inf):
            raise ValueError(
                f"data.source.min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens}): swap them"
            )
        if self.subset is not None and not self.is_hub:
            raise ValueError("data.source.subset is for data sets by name: leave it out, or give path: hf:owner/name")

    def _check_columns(self) -> None:
        if self.format == "messages":
            roles = ["assistant"] if self.template == "tokenizer" else list(ROLES)
            for role in self.learn or ():
                if role not in roles:
                    raise ValueError(f"data.source.learn: {role!r} is no role that can be learnt; "
                                     f"choose among: {', '.join(roles)}")  # fmt: skip
        if self.format not in COLUMNS:
            return
        names = self.column_names
        for key in ("prefix", "suffix"):
            given = getattr(self, key)
            if given is not None and len(given) != len(names):
                raise ValueError(f"data.source.{key} must hold one text for each of: {', '.join(names)}; "
                                 f"got {len(given)}")  # fmt: skip
        for name in self.learn or ():
            if name not in names:
                raise ValueError(f"data.source.learn: {name!r} is no column; choose among: {', '.join(names)}")
        usual = len(COLUMNS[self.format])
        if len(names) != usual and (self.format == "completion" or self.prefix is None or self.suffix is None):
            mend = f"give {usual}" + (
                ", or data.source.prefix and data.source.suffix with a text for each"
                if self.format != "completion"
                else ""
            )
            raise ValueError(f"data.source.columns: format {self.format} has {usual}, got {len(names)}: {mend}")
        if len(set(names)) < len(names):
            raise ValueError(f"data.source.columns: a column is named twice: {', '.join(names)}")

    @property
    def callable(self) -> bool:
        """Whether the format is a function of the user's."""
        words = self.format.replace(":", ".").split(".")
        return self.format.count(":") == 1 and all(word.isidentifier() for word in words)

    @property
    def is_hub(self) -> bool:
        """Whether it is a data set by name."""
        return self.path.startswith(HUB)

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder that `datasets` saved with save_to_disk."""
        return any(Path(self.path, name).is_file() for name in ("state.json", "dataset_dict.json"))

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.path if self.name is None else self.name

    @property
    def column_names(self) -> list[str]:
        """Of completion and instruction."""
        return list(COLUMNS[self.format]) if self.columns is None else self.columns

    @property
    def affixes(self) -> list[tuple[str, str]]:
        """Prefix and suffix of each column, of completion and instruction."""
        prefix, suffix = AFFIXES[self.format]
        return list(zip(self.prefix or prefix, self.suffix or suffix, strict=True))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on the documents that contents give; all else may change without preparing anew."""
        return {k: v for k, v in asdict(self).items() if k not in ("path", "name", "weight", "told")}

    def warnings(self) -> list[str]:
        """What is allowed and hardly meant."""
        found = [text for key in ("prefix", "suffix") for text in getattr(self, key) or () if "\\n" in text]
        return [
            f"data.source {self.label}: {text!r} holds a backslash and an n, which is no new line: "
            'in YAML write "\\n" in double quotes' for text in found
        ]  # fmt: skip

    def files(self) -> list[Path]:
        """The files, by name; of binidx the .idx ones. Raises: FileNotFoundError if there is none."""
        whole = Path(self.path)
        if whole.is_file():
            found = [whole]
        else:  # without hidden files, and without what `prepare` itself put there
            found = list(whole.rglob("*")) if whole.is_dir() else [Path(x) for x in glob(self.path, recursive=True)]  # noqa: PTH207 (absolute patterns too)
            found = [x for x in found if not PREPARED.fullmatch(x.name) and not (whole.is_dir() and x.name[0] == ".")]
        if self.format == "binidx":  # a pair may be named by either file, or by what they have in common
            found = [x for x in found or [Path(f"{self.path}.idx")] if x.suffix in (".idx", ".bin")]
            found = list({x.with_suffix(".idx") for x in found if x.is_file()})
            files = sorted(found)
        else:
            files = sorted(file for file in found if file.is_file())
        if not files:
            what = "pair of .idx and .bin" if self.format == "binidx" else "file"
            raise FileNotFoundError(f"data.source.path {self.path!r}: no such {what}")
        return files


def as_sources(given: Any) -> Any:
    """Sources of what a recipe says, before they are built: a dictionary, a list of them, or what is none."""
    if isinstance(given, dict):
        return Source(**given)
    return [as_sources(x) for x in given] if isinstance(given, list) else given


def listed(sources: Source | Sequence[Source]) -> list[Source]:
    """One or several, as a list. Raises: ValueError if there is none, or two have one name."""
    found = [sources] if isinstance(sources, Source) else list(sources)
    if not found:
        raise ValueError("data.source is an empty list: name at least one source")
    labels = [source.label for source in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"data.source: {labels.count(label)} sources are called {label!r}: "
                             "give each its own data.source.name")  # fmt: skip
    return found


def chosen(source: np.ndarray, weights: Sequence[float], epoch: int) -> np.ndarray | None:
    """The documents of an epoch, where a document may be read several times or not; None: each once.

    Each source is a ring in an order of its own, of which epoch e reads the stretch from e * weight to
    (e + 1) * weight times round: over the epochs no document is ever read more than once oftener than another.

    Args:
        source: (documents,) which source each is of.
        weights: how often an epoch reads a document of each.
    Raises: ValueError if nothing is left.
    """
    if all(weight == 1 for weight in weights):
        return None
    parts = []
    for number, weight in enumerate(weights):
        ring = np.random.default_rng([number, 0x50]).permutation(np.flatnonzero(source == number))
        around = Fraction(repr(float(weight))) * len(ring)
        parts.append(np.take(ring, np.arange(math.floor(epoch * around), math.floor((epoch + 1) * around)), mode="wrap")
                     if len(ring) else ring)  # fmt: skip
    found = np.concatenate(parts)
    if not len(found):
        raise ValueError(f"data.source.weight: {list(weights)} leave epoch {epoch} without documents: raise them")
    return found
