"""Walks a JSON document value by value, in memory of the largest value.

Python's own decoder reads each value from a window of the text. The library ``ijson`` does not say at which byte a
value begins, so a range could only begin at the front of the file; it also refuses NaN, and keeps the last of two
values of one name without a word.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from pipelines.sources.jsonl_rows import storable_name

__all__ = ["JsonScanner", "JsonValue"]

_CHUNK_BYTES = 2**20
_MAX_VALUE_BYTES = 64 * 2**20
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class JsonValue:
    """A value of a document."""

    offset: int
    """Byte at which it begins."""
    value: Any
    problem: str = ""
    """Why it cannot be used although it can be parsed: a name that stands twice, or text that is not UTF-8."""


class JsonScanner:
    """A position in a document. Every method raises ``ValueError``, with the byte, where the text is not JSON."""

    def __init__(self, stream: IO[bytes], offset: int = 0):
        self.offset = offset
        """Byte of the next character."""
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""
        self._at = 0
        self._ended = False
        self._twice = ""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        if offset == 0 and self.peek() == "\ufeff":
            self.skip("\ufeff")

    def peek(self) -> str:
        """The next character that is not white space; the empty string at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
                self.offset += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, expected: str) -> None:
        """Pass over one character."""
        if self.peek() != expected:
            raise ValueError(f"byte {self.offset}: {self._text[self._at : self._at + 20]!r} where {expected!r} is due")
        self._at += 1
        self.offset += len(expected.encode())

    def value(self) -> JsonValue:
        """The next value, whole."""
        self.peek()
        offset = self.offset
        while True:
            self._twice = ""
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError as error:
                if self._more():  # perhaps it was only cut off
                    continue
                raise ValueError(f"byte {offset}: {error}: {self._text[self._at : self._at + 60]!r}") from error
            except RecursionError as error:
                raise ValueError(f"byte {offset}: a value is nested too deeply") from error
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue  # a number may go on
            break
        text = self._text[self._at : end]
        problem = f"{self._twice[:60]!r} stands twice in one object" if self._twice else ""
        if not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text):
            problem = "text that is not UTF-8"
        self._at = end
        self.offset += len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
        return JsonValue(offset, value, problem)

    def rest_of_list(self) -> Iterator[JsonValue]:
        """The values of a list from here on; its opening bracket, or a value and a comma, have been passed."""
        if self.peek() == "]":
            self.skip("]")
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self.skip("]")
                return
            self.skip(",")

    def names(self) -> Iterator[str]:
        """The names of an object, after whose opening brace we are; the caller passes the value of each."""
        if self.peek() == "}":
            self.skip("}")
            return
        while True:
            name = self.value().value
            if not isinstance(name, str):
                raise ValueError(f"byte {self.offset}: {name!r} where a name is due")
            self.skip(":")
            yield name
            if self.peek() == "}":
                self.skip("}")
                return
            self.skip(",")

    def require_end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise ValueError(f"byte {self.offset}: {self._text[self._at : self._at + 20]!r} follows the document")

    def _more(self) -> bool:
        """Lengthen the window: by a chunk, or to twice its size where one value fills it."""
        kept = len(self._text) - self._at
        if self._ended or kept > _MAX_VALUE_BYTES:
            return False
        data = self._stream.read(max(_CHUNK_BYTES, kept))
        self._ended = not data
        more = self._decode(data, final=self._ended)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more) or (not self._ended and self._more())

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = {storable_name(name): value for name, value in pairs}
        if len(record) != len(pairs) and not self._twice:
            names = [name for name, _ in pairs]
            self._twice = next(name for name in names if names.count(name) > 1)
        return record
