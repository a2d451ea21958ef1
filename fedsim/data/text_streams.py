"""The bytes of a text file: decompressed, and in UTF-8 whatever they were written in."""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from fedsim.errors import InvalidInput

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
UTF_8 = "utf-8"
BLOCK = 1 << 16
UNDECODABLE = "\udc80"
"""Stands for bytes that are nothing in the encoding they are said to be in: a lone surrogate, which no text holds, and
which makes the record a bad one."""

codecs.register_error("fedsim.undecodable", lambda error: (UNDECODABLE, error.end))  # type: ignore[attr-defined]


@contextmanager
def opened(file: Path, encoding: str = UTF_8) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The text of a file as a stream in UTF-8, and the file below it, whose position tells the progress.

    Args:
        file: Plain, or compressed as the end of its name says.
        encoding: What it is written in, by Python's own name of it.

    Raises:
        InvalidInput: If the file breaks off, or begins as UTF-16 does and is not said to.
    """
    with file.open("rb") as raw:
        compression = COMPRESSIONS.get(file.suffix.lower())
        stream: BinaryIO = raw
        if compression is not None:
            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression))
        if encoding != UTF_8:
            stream = io.BufferedReader(_Recoded(stream, encoding), BLOCK)
        try:
            if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
                hint = "It begins with the mark of UTF-16: add --data.encoding utf-16."
                raise InvalidInput("data.path", str(file), "UTF-8 text", hint)
            yield stream, raw
        except (OSError, EOFError) as error:
            raise InvalidInput("data.path", str(file), "an undamaged file", f"It breaks off: {error}") from None


class _Recoded(io.RawIOBase):
    """A stream in another encoding, read as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)("fedsim.undecodable")
        self._waiting = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._waiting and not self._ended:
            block = self._stream.read(BLOCK)
            self._ended = not block
            self._waiting = self._decoder.decode(block, self._ended).encode(UTF_8, "surrogatepass")
        taken = self._waiting[: len(buffer)]
        buffer[: len(taken)] = taken
        self._waiting = self._waiting[len(taken) :]
        return len(taken)
