"""JSON that is one value however large: its items one after another, in the memory of one.

The file is cut by the brackets and quotes of the grammar alone; what lies between two cuts is parsed by the json
module, so that nothing counts as a record that is not one by itself.
"""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from fedsim.errors import InvalidInput

BLOCK = 1 << 18
LARGEST = 1 << 26
"""Bytes that one item may have."""
BLANK = re.compile(rb"[ \t\r\n]*+")
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
PLAIN = re.compile(rb"[^,\]}\s]++")
"""A number, true, false or null."""
FLAT = re.compile(rb'[{\[](?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+[}\]]', re.DOTALL)
"""A list or object without others inside: most records are."""
NEXT = re.compile(rb'[^"{}\[\]]*+(?:("(?:[^"\\]++|\\.)*+")|([{\[])|([}\]]))', re.DOTALL)
"""Up to and with the next string, or bracket that opens or closes."""
MARK = b"\xef\xbb\xbf"


class JsonStream:
    """A JSON file from its beginning on.

    Args:
        stream: In UTF-8; a byte-order mark is passed over.
        name: Of the file, for errors.
    """

    def __init__(self, stream: BinaryIO, name: str):
        self._stream = stream
        self._name = name
        self._text = b""
        self._at = 0
        self._ended = False
        while len(self._text) < len(MARK) and self._fill():
            pass
        if self._text.startswith(MARK):
            self._at = len(MARK)

    def first(self) -> bytes:
        """The next character that is no blank; empty at the end."""
        while True:
            self._at = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def elements(self) -> Iterator[bytes]:
        """The items of the list that begins here, each as it is written, and after them the end of the file.

        Raises:
            InvalidInput: If the list breaks off, an item is too large, or something stands where none may.
        """
        self._expect(b"[")
        if self.first() == b"]":
            self._expect(b"]")
        else:
            while True:
                yield self.value()
                if self._expect(b",", b"]") == b"]":
                    break
        self.require_end()

    def require_end(self) -> None:
        """Nothing follows.

        Raises:
            InvalidInput: Something does.
        """
        if self.first():
            raise self._wrong("It goes on after the end of its value.")

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. Between two, `value` or `skip` is to be called once."""
        self._expect(b"{")
        if self.first() == b"}":
            self._expect(b"}")
            return
        while True:
            if self.first() != b'"':
                raise self._wrong("A key is missing where one was expected.")
            key = self._parsed(self.value())
            self._expect(b":")
            yield str(key)
            if self._expect(b",", b"}") == b"}":
                return

    def value(self) -> bytes:
        """The value that begins here, as it is written.

        Raises:
            InvalidInput: If it breaks off, or is too large.
        """
        start = self.first()
        if start in (b"{", b"["):
            return self._nested()
        return self._take(STRING if start == b'"' else PLAIN)

    def skip(self) -> None:
        """Pass over the value that begins here; of a list or object only one item at a time is held."""
        if (start := self.first()) == b"[":
            self._expect(b"[")
            while self.first() not in (b"]", b""):
                self.value()
                if self.first() == b",":
                    self._expect(b",")
            self._expect(b"]")
        elif start == b"{":
            for _ in self.members():
                self.value()
        else:
            self.value()

    def _nested(self) -> bytes:
        if flat := FLAT.match(self._text, self._at):
            self._at = flat.end()
            return flat.group()
        depth, place = 0, 0  # places count from self._at, which moves when more is read
        while True:
            found = NEXT.match(self._text, self._at + place)
            if found is None:
                if len(self._text) - self._at > LARGEST:
                    raise self._wrong(f"An item of it has more than {LARGEST >> 20} MiB.")
                if not self._fill():
                    raise self._wrong("It breaks off within an item.")
                continue
            place = found.end() - self._at
            depth += bool(found[2]) - bool(found[3])
            if not depth:
                taken = self._text[self._at : self._at + place]
                self._at += place
                return taken

    def _take(self, pattern: re.Pattern[bytes]) -> bytes:
        while True:
            found = pattern.match(self._text, self._at)
            if found and (found.end() < len(self._text) or self._ended):
                self._at = found.end()
                return found.group()
            if len(self._text) - self._at > LARGEST:
                raise self._wrong(f"An item of it has more than {LARGEST >> 20} MiB.")
            hopeless = found is None and pattern is PLAIN
            if hopeless or not self._fill():
                if found:
                    continue
                raise self._wrong("It breaks off, or has no value where one was expected.")

    def _expect(self, *characters: bytes) -> bytes:
        found = self.first()
        if found not in characters:
            shown = repr(found.decode("ascii", "replace")) if found else "the end"
            wanted = " or ".join(repr(character.decode()) for character in characters)
            raise self._wrong(f"There is {shown} where {wanted} was expected.")
        self._at += 1
        return found

    def _parsed(self, text: bytes) -> object:
        try:
            return json.loads(text.decode("utf-8", "surrogateescape"))
        except ValueError:
            raise self._wrong("A key cannot be read.") from None

    def _fill(self) -> bool:
        """Read on; what has been taken is let go."""
        block = b"" if self._ended else self._stream.read(BLOCK + len(self._text) - self._at)
        self._ended = not block
        self._text = self._text[self._at :] + block
        self._at = 0
        return bool(block)

    def _wrong(self, hint: str) -> InvalidInput:
        return InvalidInput("data.path", self._name, "a whole JSON value", f"{hint} {AS_LINES}")


AS_LINES = "Of a file that cannot be cut into records none is read; in JSON lines a bad line is left out alone."
