"""Texts to tokens, with whatever tokenizer the caller has."""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import tokenizers

from fedsim.errors import InvalidInput

PROBE = ["The quick brown fox.", "def f(x):\n    return x", "Ünïcode, 中文 and 1234567890!"]


class TextEncoder:
    """Encodes many texts at once.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, a Hugging Face tokenizer, or a callable that takes a list of texts and
            returns a list of lists of token ids (its vocab_size and eos_token_id are used where it has them).
        special_tokens: Let the tokenizer add its own special tokens (a callable decides for itself).
        end_of_text: End every text with the tokenizer's end-of-text token.

    Raises:
        InvalidInput: If it is none of these, or has no end-of-text token when one is asked for.
    """

    def __init__(self, tokenizer: Any, *, special_tokens: bool = True, end_of_text: bool = False):
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._encode, identity = _adapt(tokenizer)
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
        template = getattr(tokenizer, "chat_template", None)
        self.fingerprint: str = _hash([identity, template])
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
        rows = self._encode(list(texts), begin and self._special_tokens)
        if end and self._end is not None:
            rows = [[*row, self._end] for row in rows]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
        limit = self.vocabulary_size or 2**32
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < limit):
            raise InvalidInput("tokenizer", type(self._tokenizer).__name__, f"one whose ids are from 0 to {limit - 1}")
        return tokens.astype(self.dtype), lengths

    def render(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """A conversation as (what is read, what is to be predicted), through the tokenizer's chat template.

        The second part is the last message, when the assistant wrote it and the template renders the conversation
        as its beginning followed by that message; otherwise everything is to be predicted and the first is empty.

        Raises:
            InvalidInput: If the tokenizer has no chat template.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            hint = "Use a chat model's tokenizer, or set tokenizer.chat_template."
            raise InvalidInput("data.messages-column", "given", "left out: the tokenizer has no chat template", hint)
        whole = self._tokenizer.apply_chat_template(messages, tokenize=False)
        if len(messages) > 1 and messages[-1].get("role") == "assistant":
            read = self._tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            if whole.startswith(read):
                return read, whole[len(read) :]
        return "", whole


def _adapt(tokenizer: Any) -> tuple[Callable[[list[str], bool], list[list[int]]], str]:
    """How to encode a list of texts, and a text that identifies the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(backend, tokenizers.Tokenizer):
        # A copy, because truncation and padding that a caller left switched on would cut or fill examples.
        own = tokenizers.Tokenizer.from_str(backend.to_str())
        own.no_truncation()
        own.no_padding()

        def encode(texts: list[str], special: bool) -> list[list[int]]:
            return [row.ids for row in own.encode_batch_fast(texts, add_special_tokens=special)]

        return encode, own.to_str()
    if hasattr(tokenizer, "convert_tokens_to_ids") and callable(tokenizer):

        def encode(texts: list[str], special: bool) -> list[list[int]]:
            rows: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"]
            return rows

        return encode, json.dumps([tokenizer.get_vocab(), encode(PROBE, True)], sort_keys=True)
    if callable(tokenizer):
        return lambda texts, special: tokenizer(texts), json.dumps([list(map(int, row)) for row in tokenizer(PROBE)])
    allowed = "a tokenizers.Tokenizer, a Hugging Face tokenizer, or a callable from texts to lists of token ids"
    raise InvalidInput("tokenizer", type(tokenizer).__name__, allowed)


def _vocabulary_size(tokenizer: Any) -> int | None:
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer.get_vocab_size()
    if hasattr(tokenizer, "__len__"):
        return len(tokenizer)
    return getattr(tokenizer, "vocab_size", None)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
