"""A JSON file of any length read piece by piece, with the values that ``json.loads`` gives and the text they came from.

The parser is Python's own, applied to one value after another: so there is nothing that it reads and this does not,
such as NaN, integers of any length and lone surrogates, on which other parsers of streams fail or differ.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")

_TOKEN = 64
"""Longer than any number's end, word or escape: an error nearer to the end of what was read may be none."""


class NotJsonError(Exception):
    """What is wrong, and where."""


class Scanner:
    """A place in a JSON text, of which only the part around it is held.

    Args:
        chunks: the file's bytes, in parts of any size.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        head = next(self._chunks, b"")
        while len(head) < 4 and (more := next(self._chunks, b"")):  # what tells UTF-8, -16 and -32 apart
            head += more
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(head))("surrogatepass")  # as json.loads does
        self._parse = json.JSONDecoder().raw_decode
        self._passed = 0  # characters before the text
        self._ended = False
        self._text, self._at = self._decode(head), 0

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next. After each, take its value, by ``value`` or ``items``.

        Raises:
            NotJsonError: this is no object, and so below.
        """
        self._take("{", "Expecting an object")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._wrong("Expecting property name enclosed in double quotes", self._at)
            key = self.value()[1]
            self._take(":", "Expecting ':' delimiter")
            yield key
            if self._next("}"):
                return

    def items(self) -> Iterator[tuple[str, Any]]:
        """Text and value of each item of the list that comes next."""
        self._take("[", "Expecting a list")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self._next("]"):
                return

    def value(self) -> tuple[str, Any]:
        """Text and value of what comes next, whatever it is."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _TOKEN
                if cut_off and self._more():
                    continue
                raise self._wrong(error.msg, error.pos) from None
            if len(self._text) - end < _TOKEN and self._more():  # a number may go on
                continue
            text, self._at = self._text[self._at : end], end
            return text, value

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def end(self) -> None:
        """See that nothing follows."""
        if self.peek():
            raise self._wrong("Extra data", self._at)

    def _take(self, character: str, message: str) -> None:
        if self.peek() != character:
            raise self._wrong(message, self._at)
        self._at += 1

    def _next(self, closing: str) -> bool:
        """Pass over a comma, or the end of the list or object, and tell whether it was the end."""
        found = self.peek()
        if found not in (",", closing) or not found:
            raise self._wrong("Expecting ',' delimiter", self._at)
        self._at += 1
        return found == closing

    def _more(self) -> bool:
        """Let go of what was passed and read on, as much as is held at least; at the end of the file change nothing."""
        held = self._text[self._at :]
        new: list[str] = []
        missing = max(len(held), 1)
        while missing > 0 and not self._ended:
            data = next(self._chunks, None)
            self._ended = data is None
            new.append(self._decode(data or b"", final=self._ended))
            missing -= len(new[-1])
        if not any(new):
            return False
        self._passed += self._at
        self._text, self._at = "".join([held, *new]), 0
        return True

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        try:
            return self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise NotJsonError(f"{error.reason}: byte 0x{error.object[error.start]:02x}") from None

    def _wrong(self, message: str, position: int) -> NotJsonError:
        return NotJsonError(f"{message}: character {self._passed + position + 1:,}")
