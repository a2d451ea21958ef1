"""A statement's paragraph as a list: cut where its parts meet, and not a word of it changed."""

import re
from typing import Any

NOT_COVERED = "What this does not cover:"
"""Begins the last part of a statement's paragraph; its sentences are a list already."""


def guarantee(statement: dict[str, Any]) -> list[str]:
    """What a statement says but for what it does not cover, part after part; joined by blanks it is the paragraph.

    Cut are: the sentences before the algorithm's, then who takes part, what a user can contribute, the noise, the
    rounds, and what was made of the releases. A paragraph of another form is cut into sentences.
    """
    text = str(statement["in_words"]).partition(NOT_COVERED)[0].strip()
    parts = [_words(statement.get(name)) for name in ("sampling", "contribution_bound", "mechanism")]
    places: list[tuple[int, int]] = []
    for part in parts:
        place = text.find(part, places[-1][1] if places else 0) if part else -1
        if place < 0:
            return _sentences(text)
        places.append((place, place + len(part)))
    title = text.rfind(" ", 0, max(0, places[0][0] - 1)) + 1  # "ULS: " stands before the sampling
    rounds = re.compile(r"; (?=[\d,]+ steps\.)").search(text, places[-1][1])
    cuts = [title, places[1][0], places[2][0], *([rounds.end()] if rounds else [])]
    pieces = [text[start:stop].strip() for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [*_sentences(pieces[0]), *pieces[1:-1], *_sentences(pieces[-1])]


def _words(value: Any) -> str:
    return str(value.get("in_words", "")) if isinstance(value, dict) else str(value or "")


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=\.)\s+(?=[A-Z])", text) if part]
