"""Texts to tokens, with whatever tokenizer the caller has."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import tokenizers

from fedsim.data.backends import Ranges, backend_of, target_frame
from fedsim.data.chat import ChatTemplate, Conversation
from fedsim.data.config import Replies
from fedsim.data.frame import BARE, Frame
from fedsim.errors import InvalidInput

Framed = Literal["text", "pair", "apart"]
"""text: each row is a text by itself. pair: a prompt and a text, which the tokenizer puts something between. apart: a
prompt for an encoder and a text for a decoder, each with special tokens of its own."""


class TextEncoder:
    """Encodes many texts at once.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, a Hugging Face tokenizer, or a callable that takes a list of texts and
            returns a list of lists of token ids (its vocab_size and eos_token_id are used where it has them).
        special_tokens: Let the tokenizer add its own special tokens (a callable decides for itself).
        end_of_text: End every text with the tokenizer's end-of-text token.
        framed: The special tokens are to stand around every row, however it is cut (`frame`), and not around texts.
        replies: Which of the assistant's messages in a conversation count in the loss.

    Raises:
        InvalidInput: If it is none of these, or has no end-of-text token when one is asked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        special_tokens: bool = True,
        end_of_text: bool = False,
        framed: Framed | None = None,
        replies: Replies = "last",
    ):
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._replies = replies
        self._backend = backend_of(tokenizer)
        self.vocabulary_size: int | None = _vocabulary_size(tokenizer)
        """Tokens that the tokenizer can give, where it says so."""
        self.dtype: np.dtype = np.min_scalar_type((self.vocabulary_size or 2**32) - 1)
        """The narrowest unsigned integer that holds every token."""
        self._end: int | None = None
        if end_of_text:
            self._end = getattr(tokenizer, "eos_token_id", None)
            if isinstance(tokenizer, tokenizers.Tokenizer):
                known = (tokenizer.token_to_id(name) for name in ("<|endoftext|>", "</s>", "<eos>", "[SEP]"))
                self._end = next((token for token in known if token is not None), None)
            if self._end is None:
                raise InvalidInput("data.end-of-text", True, "False for a tokenizer without an end-of-text token")
        self.framed = framed
        """What the special tokens stand around, where that is every row."""
        self.frame: Frame | None = None if framed is None else self._frame(framed)
        """What stands around every row; None where special tokens stand around texts."""
        self.fingerprint: str = self._fingerprint_of(self._backend.identity)
        """Hash of the tokenizer, hexadecimal: equal when it encodes alike."""

    def encode(self, texts: Sequence[str], *, begin: bool = True, end: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the texts, end to end.

        Args:
            texts: Texts, valid Unicode.
            begin: The texts begin an example: special tokens are added here alone.
            end: The texts end an example: end-of-text tokens are added here alone.

        Returns:
            (token ids of the narrowest type [total tokens], tokens of each text int64 [texts]).
        """
        rows = self._backend.encode(list(texts), begin and self._special_tokens)
        if end and self._end is not None:
            rows = [[*row, self._end] for row in rows]
        return self._joined(rows)

    def encode_framed(self, texts: Sequence[str], *, target: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of texts that are to be put into `frame`, end to end, as `encode` returns them.

        The token that ends a text is in none of them: a text that spells it ("</s>", in HTML) is read letter by
        letter. Classifiers that answer at this token refuse rows of which one has more of it than another.

        Args:
            texts: Texts, valid Unicode.
            target: They are what a decoder is to write.
        """
        rows = self._backend.encode_target(list(texts)) if target else self._backend.encode(list(texts), False)
        end = getattr(self._tokenizer, "eos_token_id", None)
        if end is not None and self.frame:
            spelt = [place for place, row in enumerate(rows) if end in row]
            literal = self._backend.encode_literally([texts[place] for place in spelt]) if spelt else []
            for place, row in zip(spelt, literal, strict=True):
                rows[place] = row
        return self._joined(rows)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of conversations as the chat template wrote them, end to end.

        Returns:
            (token ids of the narrowest type [total tokens], tokens of each conversation int64 [conversations],
            uint8 [total tokens]: 1 where a token counts in the loss).
        """
        texts, said = [talk.text for talk in conversations], [talk.said for talk in conversations]
        rows, ranges = self._backend.ranges(texts, said)
        scored = [_within(places, len(row)) for row, places in zip(rows, ranges, strict=True)]
        if self._end is not None:
            rows = [[*row, self._end] for row in rows]
            scored = [np.append(marks, talk.ends_said) for marks, talk in zip(scored, conversations, strict=True)]
        marks = np.concatenate(scored) if scored else np.empty(0)
        return *self._joined(rows), marks.astype(np.uint8)

    def found_fingerprint(self) -> str:
        """The fingerprint, computed again: in another process a tokenizer of the same name may be another one."""
        return self._fingerprint_of(backend_of(self._tokenizer).identity)

    def render(self, messages: list[dict[str, str]]) -> Conversation:
        """A conversation through the tokenizer's chat template.

        Raises:
            InvalidInput: If the tokenizer has no chat template.
            BadRecord: See `ChatTemplate.render`.
        """
        return self._chat.render(messages)

    def _fingerprint_of(self, identity: str) -> str:
        return _hash([identity, getattr(self._tokenizer, "chat_template", None)])

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._replies)

    def _frame(self, framed: Framed) -> Frame:
        if not self._special_tokens:
            found = BARE
        elif framed == "apart":
            prompt, text = self._backend.frame(pair=False), target_frame(self._tokenizer)
            found = Frame(before=prompt.before, between=prompt.after, opening=text.before, after=text.after)
        else:
            found = self._backend.frame(pair=framed == "pair")
        if self._end is None or self._end in found.after:
            return found
        return replace(found, after=(self._end, *found.after))

    def _joined(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        limit = self.vocabulary_size or 2**32
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < limit):
            raise InvalidInput("tokenizer", type(self._tokenizer).__name__, f"one whose ids are from 0 to {limit - 1}")
        return tokens.astype(self.dtype), lengths


def _within(places: Ranges, length: int) -> np.ndarray:
    """bool [length]: True within one of the ranges."""
    edges = np.zeros(length + 1, dtype=np.int64)
    for first, last in places:
        edges[first] += 1
        edges[last] -= 1
    inside: np.ndarray = np.cumsum(edges)[:-1] > 0
    return inside


def _vocabulary_size(tokenizer: Any) -> int | None:
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer.get_vocab_size()
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    return getattr(tokenizer, "vocab_size", None)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
