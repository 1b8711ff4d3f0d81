"""The records of a .json file, however long: never more than one of them is held."""

import io
import json
from collections.abc import Iterator
from typing import Any

BLOCK = 1 << 20  # characters that are looked at together


class JsonStream:
    """The values of a list in a stream, each parsed by `json`, never more than one of them held."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream, self._text, self._at, self._parse = stream, "", 0, json.JSONDecoder().raw_decode

    def next(self, take: str = "") -> str:
        """The next character that is no space; taken if it is one of `take`."""
        while True:
            while self._at < len(self._text):
                found = self._text[self._at]
                if not found.isspace():
                    self._at += bool(take) and found in take
                    return found
                self._at += 1
            if not self._more():
                return ""

    def value(self) -> Any:
        """Parse what comes next."""
        self.next()
        while True:
            try:
                value, self._at = self._parse(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                open_end = error.msg.startswith("Unterminated") or error.pos + 16 > len(self._text)
                if not (open_end and self._more()):
                    raise ValueError(f"not JSON: {error.msg}: mend the file") from None

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        if self.next("[") != "[":
            raise ValueError(f"not JSON: a list must begin with [, found {self.next()!r}: mend the file")
        if self.next("]") == "]":
            return
        while True:
            yield self.value()
            if (found := self.next(",]")) != ",":
                break
        if found != "]":
            raise ValueError(f"not JSON: expected , or ] and found {found or 'the end of the file'!r}: mend the file")

    def find(self, key: str) -> None:
        """Go to the value of a key of the object that begins here."""
        seen = []
        if self.next("{") == "{":
            while self.next() == '"':
                seen.append(self.value())
                self.next(":")
                if seen[-1] == key:
                    return
                self.value()
                self.next(",")
        raise ValueError(f"no key {key!r} (data.source.key); found: {', '.join(map(repr, seen[:5])) or 'no object'}")

    def _more(self) -> bool:
        rest = self._text[self._at :]
        block = self._stream.read(max(BLOCK, len(rest)))
        self._text, self._at = rest + block, 0
        return bool(block)
