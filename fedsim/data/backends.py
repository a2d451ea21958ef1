"""The kinds of tokenizer, and what each can be asked."""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tokenizers

from fedsim.data.frame import BARE, Frame
from fedsim.errors import InvalidInput

PROBE = ["The quick brown fox.", "def f(x):\n    return x", "Ünïcode, 中文 and 1234567890!"]
TEXTS_AT_ONCE = 4096
"""What the tokenizers library knows of a token takes fifty times the room of its number: kept of so many texts."""

Ranges = Sequence[tuple[int, int]]
"""Places in a text, first and after the last, ascending and apart."""


class Backend(Protocol):
    """Turns texts into tokens."""

    identity: str
    """The same text for tokenizers that encode alike."""

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        """Tokens of each text, with the tokenizer's special tokens around it or without."""

    def encode_literally(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, in which the names of special tokens are letters like others."""

    def encode_target(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that a decoder is to write, without special tokens: some have a vocabulary for them."""

    def frame(self, pair: bool) -> Frame:
        """The special tokens that the tokenizer puts around a text, or around and between two."""

    def ranges(self, texts: list[str], ranges: Sequence[Ranges]) -> tuple[list[list[int]], list[Ranges]]:
        """Tokens of each text without special tokens around it, and where its ranges of characters lie in them."""


def backend_of(tokenizer: Any) -> Backend:
    """What encodes with this tokenizer.

    Raises:
        InvalidInput: If it is no tokenizer.
    """
    library = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(library, tokenizers.Tokenizer):
        return _Library(library)
    if hasattr(tokenizer, "convert_tokens_to_ids") and callable(tokenizer):
        return _Python(tokenizer)
    if callable(tokenizer):
        return _Function(tokenizer)
    allowed = "a tokenizers.Tokenizer, a Hugging Face tokenizer, or a callable from texts to lists of token ids"
    raise InvalidInput("tokenizer", type(tokenizer).__name__, allowed)


class _Library:
    """A tokenizer of the tokenizers library, alone or inside one of transformers."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # A copy, because truncation and padding that a caller left switched on would cut or fill examples.
        self._own = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._own.no_truncation()
        self._own.no_padding()
        self.identity = self._own.to_str()

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        rows: list[list[int]] = []
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[begin : begin + TEXTS_AT_ONCE]
            rows += [row.ids for row in self._own.encode_batch_fast(some, add_special_tokens=special)]
        return rows

    def encode_literally(self, texts: list[str]) -> list[list[int]]:
        self._own.encode_special_tokens = True
        try:
            return self.encode(texts, False)
        finally:
            self._own.encode_special_tokens = False

    def encode_target(self, texts: list[str]) -> list[list[int]]:
        return self.encode(texts, False)

    def frame(self, pair: bool) -> Frame:
        text = " ".join(PROBE)
        row = self._own.encode(text, text if pair else None)
        return _frame(row.ids, row.sequence_ids, pair)

    def ranges(self, texts: list[str], ranges: Sequence[Ranges]) -> tuple[list[list[int]], list[Ranges]]:
        # A byte-level post-processor takes blanks out of a token's characters: those at a range's end would be lost.
        processor, self._own.post_processor = self._own.post_processor, None
        try:
            rows = self._own.encode_batch(texts, add_special_tokens=False)
        finally:
            self._own.post_processor = processor
        found: list[Ranges] = []
        for row, asked in zip(rows, ranges, strict=True):
            begins, ends = zip(*row.offsets, strict=True) if row.offsets else ((), ())
            found.append([(bisect_right(ends, first), bisect_left(begins, last)) for first, last in asked])
        return [row.ids for row in rows], found


class _Python:
    """A tokenizer of transformers that is written in Python."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.identity = json.dumps([tokenizer.get_vocab(), self.encode(PROBE, True)], sort_keys=True)

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        return rows

    def encode_literally(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        rows: list[list[int]] = found["input_ids"]
        return rows

    def encode_target(self, texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = self._tokenizer(text_target=texts, add_special_tokens=False)["input_ids"]
        return rows

    def frame(self, pair: bool) -> Frame:
        row = self._tokenizer.build_inputs_with_special_tokens([-1], [-2] if pair else None)
        return _frame(row, [{-1: 0, -2: 1}.get(token) for token in row], pair)

    def ranges(self, texts: list[str], ranges: Sequence[Ranges]) -> tuple[list[list[int]], list[Ranges]]:
        return _piecewise(lambda pieces: self.encode(pieces, False), texts, ranges)


class _Function:
    """Any callable from texts to token ids, which decides for itself about special tokens."""

    def __init__(self, tokenizer: Callable[[list[str]], list[list[int]]]):
        self._tokenizer = tokenizer
        self.identity = json.dumps([list(map(int, row)) for row in tokenizer(PROBE)])

    def encode(self, texts: list[str], special: bool) -> list[list[int]]:
        return self._tokenizer(texts)

    def encode_literally(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts)

    def encode_target(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts)

    def frame(self, pair: bool) -> Frame:
        return BARE

    def ranges(self, texts: list[str], ranges: Sequence[Ranges]) -> tuple[list[list[int]], list[Ranges]]:
        return _piecewise(self._tokenizer, texts, ranges)


def target_frame(tokenizer: Any) -> Frame:
    """The special tokens around a text that a decoder is to write: a Hugging Face tokenizer may have others there."""
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        return backend_of(tokenizer).frame(pair=False)
    text = " ".join(PROBE)
    bare, row = (tokenizer(text_target=text, add_special_tokens=special)["input_ids"] for special in (False, True))
    places = [place for place in range(len(row) - len(bare) + 1) if row[place : place + len(bare)] == bare]
    begin = places[0] if bare and places else len(row)
    inside = range(begin, begin + len(bare))
    return _frame(row, [0 if place in inside else None for place in range(len(row))], pair=False)


def _frame(row: Sequence[int], sequences: Sequence[int | None], pair: bool) -> Frame:
    """The special tokens of a row, told apart by the sequence that each of its other tokens belongs to."""
    places = [[place for place, sequence in enumerate(sequences) if sequence == part] for part in (0, 1)[: 1 + pair]]
    bounds = [(part[0], part[-1] + 1) if part else (0, 0) for part in places]
    if not all(places) or (pair and bounds[0][1] > bounds[1][0]):
        raise InvalidInput("tokenizer", list(row), "one that puts a prompt before its text, and special tokens around")
    (begin, end), (_, last) = bounds[0], bounds[-1]
    between = row[end : bounds[1][0]] if pair else ()
    return Frame(before=tuple(row[:begin]), between=tuple(between), after=tuple(row[last:]))


def _piecewise(
    encode: Callable[[list[str]], list[list[int]]], texts: list[str], ranges: Sequence[Ranges]
) -> tuple[list[list[int]], list[Ranges]]:
    """Each range, and what stands between, encoded by itself: for tokenizers that do not say where a token was."""
    cuts = [[0, *(place for bounds in asked for place in bounds)] for asked in ranges]
    pieces = [
        [text[a:b] for a, b in zip(at, [*at[1:], None], strict=True)] for text, at in zip(texts, cuts, strict=True)
    ]
    encoded = iter(encode([piece for parts in pieces for piece in parts if piece]))
    rows: list[list[int]] = []
    found: list[Ranges] = []
    for parts in pieces:
        row: list[int] = []
        places = []
        for piece in parts:
            row += next(encoded) if piece else []
            places.append(len(row))
        rows.append(row)
        found.append(list(zip(places[0:-1:2], places[1:-1:2], strict=True)))
    return rows, found
