"""How long a row a model can read: what its configuration says, and what its tables of positions have rows for."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

UNLIMITED = 10**9
"""An unknown length is a huge number; some models say −1."""

LIMITS = ("max_position_embeddings", "max_seq_len")
"""What configurations call the number of positions."""

POSITION_TABLE = re.compile(r"(?:^|_)(?:position|positions|pos)(?:_|$)|^wpe$")
"""Names of modules that hold a row for each position."""
OTHER_TABLE = re.compile(r"rel|[xyhw]_|row|col|patch")
"""Of those, names of tables of distances and of places on a page."""
OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech")
"""Parts of a model that do not read text."""
WRAPPERS = ("base_layer", "original_module", "modules_to_save", "default")
"""What PEFT puts behind the name of a module that it adapts."""


def longest_row(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens in a row that the model can read; None where its positions have no limit.

    Args:
        model: A Hugging Face model, a PEFT model around one, or any module.
        tokenizer: Its own: it may say less.
    """
    limits = _rows_of_tables(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        text = config.get_text_config()
        limits += [*(getattr(text, name, None) for name in LIMITS), *_changes_of_rotation(text)]
    known = [n for n in (*limits, tokenizer.model_max_length) if n is not None and 0 < n < UNLIMITED]
    return int(min(known)) if known else None


def _changes_of_rotation(config: Any) -> list[int | None]:
    """Rotations of the kind "longrope" change for a whole batch once its longest row exceeds a length.

    A short row would then be read in another way beside a long one.
    """
    rotations = getattr(config, "rope_parameters", None) or {}
    return [
        kind.get("original_max_position_embeddings")
        for kind in (rotations, *rotations.values())
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
    ]


def _rows_of_tables(model: Any) -> list[int | None]:
    """Of each table of positions how many tokens it has rows for.

    Some begin with rows that no token has: with an offset (BART, OPT), or behind the row of padding (RoBERTa), so that
    `max_position_embeddings` is 514 where 512 tokens can be read.
    """
    found: list[int | None] = []
    for path, module in model.named_modules():
        parts = [part for part in path.split(".") if part not in WRAPPERS]
        weight: Any = getattr(module, "weight", None)
        if not parts or getattr(weight, "ndim", 0) != 2 or not POSITION_TABLE.search(parts[-1]):
            continue
        if OTHER_TABLE.search(parts[-1]) or any(OTHER_SENSES.search(part) for part in parts):
            continue
        offset, padding = getattr(module, "offset", None), getattr(module, "padding_idx", None)
        unused = offset if isinstance(offset, int) else 0 if padding is None else padding + 1
        found.append(len(weight) - unused)
    return found
