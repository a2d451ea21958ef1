"""Stores that a test can read: one token a character."""

import json
from collections import Counter
from pathlib import Path

from fedsim.data.chat import Conversation
from fedsim.data.check import good_records
from fedsim.data.config import DataConfig
from fedsim.data.recipes import resolve
from fedsim.data.records import Tally
from fedsim.data.sources import open_source


class LetterTokenizer:
    """One token a character, so that a test can read a row and count its tokens."""

    vocab_size = 256
    eos_token_id = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("latin-1", "replace")) for text in texts]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def text_of(rows, place: int) -> str:
    """A row of LetterTokenizer's tokens as text."""
    return bytes(rows.tokens[rows.offsets[place] : rows.offsets[place + 1]].tolist()).decode("latin-1")


def texts_by_user(store) -> dict[str, list[str]]:
    """Every user's rows as text, by the user's name."""
    texts = {}
    for user, name in enumerate(store.user_ids()):
        rows = store.take(range(*store.rows_of(user)))
        texts[name] = [text_of(rows, place) for place in range(len(rows))]
    return texts


def read_texts(config: DataConfig) -> tuple[dict[str, Counter[str]], dict[str, int]]:
    """What a store of the data would hold: texts by user, and how many records are left out for which reason."""
    config, bad = resolve(config), Tally()
    source = open_source(config, Path("unused"))
    options = {
        "normalised": config.user_ids == "normalised",
        "owners_separator": config.owners_separator,
        "missing_ids": config.missing_ids,
    }
    good = good_records(list(source.read()), source.columns, lambda _: Conversation("", []), bad, **options)
    texts: dict[str, Counter[str]] = {}
    for user, text in zip(good["user"], good["text"], strict=True):
        texts.setdefault(user, Counter())[text] += 1
    return texts, bad.counts
