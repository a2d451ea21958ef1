"""Tokens that a model has an embedding of: some tokenizers know more."""

from typing import Protocol

from fedsim.errors import InvalidInput
from fedsim.models.load import LoadedModel, embeddings


class Tokens(Protocol):
    """Rows that know which tokens occur in them."""

    @property
    def largest_token(self) -> int:
        """The largest there is, 0 without tokens."""


def require_embedded(loaded: LoadedModel, data: Tokens) -> None:
    """Refuse data, or padding, with a token that the model has no embedding of.

    Tokens that only the tokenizer knows and that occur nowhere are no reason: Gemma 3's has one for images.

    Args:
        loaded: The model.
        data: The users' rows.

    Raises:
        InvalidInput: Names a token.
    """
    known = embeddings(loaded)
    largest = max(loaded.pad_token, data.largest_token)
    if known is None or largest < known:
        return
    needed = max(len(loaded.tokenizer), largest + 1)  # numbers may have gaps
    what = "pads with" if largest == loaded.pad_token else "makes of the data"
    raise InvalidInput(
        "model.path",
        loaded.config.path,
        "a model with an embedding of every token that occurs",
        f"Its tokenizer has {len(loaded.tokenizer)} tokens, its embedding {known}; the tokenizer {what} "
        f"{loaded.tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}. Save the model with its embedding "
        f"resized (resize_token_embeddings({needed})), or with a tokenizer without that token.",
    )
