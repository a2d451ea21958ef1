"""Tokens without an embedding are refused by their numbers, however many there are."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.errors import InvalidInput
from fedsim.models.vocabulary import require_embedded


class Tokenizer:
    """Knows so many tokens, with gaps between their numbers."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


@pytest.mark.parametrize("tokens", [250, 300, 350])
@pytest.mark.parametrize(
    ("pad", "largest", "refused"),
    [(0, 299, ""), (299, 0, ""), (0, 300, "makes of the data '<300>'"), (300, 0, "pads with '<300>'")],
)
def test_what_counts_is_the_largest_number(tokens: int, pad: int, largest: int, refused: str) -> None:
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(300, 1))
    config = SimpleNamespace(path="a model")
    loaded: Any = SimpleNamespace(model=model, tokenizer=Tokenizer(tokens), pad_token=pad, config=config)
    if not refused:
        return require_embedded(loaded, SimpleNamespace(largest_token=largest))
    with pytest.raises(
        InvalidInput, match=f"its embedding 300; the tokenizer {refused}.*embeddings.{max(tokens, 301)}.*"
    ):
        require_embedded(loaded, SimpleNamespace(largest_token=largest))
