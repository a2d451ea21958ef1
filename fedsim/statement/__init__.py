"""The privacy statement: what a run guarantees, to whom, and what it does not."""

from fedsim.statement.card import CARD, model_card, write_card
from fedsim.statement.earlier_words import going_on_in_words
from fedsim.statement.not_covered import (
    ALWAYS_NOT_COVERED,
    CLASSES_FROM_DATA,
    KNOWN_SAMPLING,
    KNOWN_TURNS,
    NOT_COVERED_BY_ORIGIN,
    PSEUDO_RANDOM_SAMPLING,
    REPRODUCIBLE_NOISE,
    NoiseOrigin,
)
from fedsim.statement.statement import NEIGHBOURS, PrivacyStatement, privacy_statement

__all__ = [
    "ALWAYS_NOT_COVERED",
    "CARD",
    "CLASSES_FROM_DATA",
    "KNOWN_SAMPLING",
    "KNOWN_TURNS",
    "NEIGHBOURS",
    "NOT_COVERED_BY_ORIGIN",
    "PSEUDO_RANDOM_SAMPLING",
    "REPRODUCIBLE_NOISE",
    "NoiseOrigin",
    "PrivacyStatement",
    "going_on_in_words",
    "model_card",
    "privacy_statement",
    "write_card",
]
