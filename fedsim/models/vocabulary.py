"""Tokens that a model has an embedding of: some tokenizers know more."""

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.models.load import LoadedModel, embedded_tokens
from fedsim.rows import Splits

ROWS = 2**14
"""Rows looked through at a time."""
SPLITS = ("train", "validation", "test")


def require_embedded(loaded: LoadedModel, store: Splits) -> None:
    """Refuse data, or padding, with a token that the model has no embedding of.

    Data are looked through only where the tokenizer knows such tokens at all. Those that occur nowhere are no reason
    to refuse: Gemma 3's tokenizer has one for images.

    Args:
        loaded: The model.
        store: The users' rows.

    Raises:
        InvalidInput: Names a token.
    """
    known = embedded_tokens(loaded)
    if known == len(loaded.tokenizer):
        return
    largest = max(loaded.pad_token, _largest(store))
    if largest < known:
        return
    what = "pads with" if largest == loaded.pad_token else "makes of the data"
    raise InvalidInput(
        "model.path",
        loaded.config.path,
        "a model with an embedding of every token that occurs",
        f"Its tokenizer has {len(loaded.tokenizer)} tokens, its embedding {known}; the tokenizer {what} "
        f"{loaded.tokenizer.convert_ids_to_tokens(largest)!r}, number {largest}. Save the model with its embedding "
        f"resized (resize_token_embeddings({len(loaded.tokenizer)})), or with a tokenizer without that token.",
    )


def _largest(store: Splits) -> int:
    """The largest token of the store."""
    largest = -1
    for view in map(store.split, SPLITS):
        rows = len(view.row_lengths)
        for start in range(0, rows, ROWS):
            part = view.take(np.arange(start, min(start + ROWS, rows)))
            largest = max(largest, int(part.tokens.max(initial=-1)))
    return largest
