"""Clipped gradients of many units: one contract, a reference loop and a fast path behind it."""

from fedsim.clip import CLIP_MARGIN
from fedsim.gradients.clipping import ClippedSum
from fedsim.gradients.model import ParameterLayout
from fedsim.gradients.objective import (
    Batch,
    CausalLanguageModel,
    Objective,
    RowLosses,
    SequenceClassification,
    SequenceToSequence,
    random_rows,
)
from fedsim.gradients.reference import LocalSteps, clipped_units
from fedsim.gradients.sums import clipped_sum
from fedsim.gradients.trial.verdict import gradient_paths, layer_paths, note_reference

__all__ = [
    "CLIP_MARGIN",
    "Batch",
    "CausalLanguageModel",
    "ClippedSum",
    "LocalSteps",
    "Objective",
    "ParameterLayout",
    "RowLosses",
    "SequenceClassification",
    "SequenceToSequence",
    "clipped_sum",
    "clipped_units",
    "gradient_paths",
    "layer_paths",
    "note_reference",
    "random_rows",
]
