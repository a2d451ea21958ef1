"""Vectors as wide as a vocabulary: units of unlike lengths are not copied to be filled up, and the sum is the same."""

import numpy as np
import pytest
import torch
from gradient_checks import TOLERANCE, assert_same, ragged
from packed_models import gpt2, llama

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum, head
from fedsim.gradients.rows import segments as rows_segments
from fedsim.gradients.rows.segments import WIDE, Bucket, Segments

OBJECTIVE = CausalLanguageModel()


@pytest.mark.parametrize("make", [gpt2, llama])  # with a tied head, and without
@pytest.mark.parametrize("kept", [True, False])
def test_the_sum_is_that_of_the_reference(make, kept: bool, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    torch.manual_seed(0)
    model = make()
    monkeypatch.setattr(rows_segments, "WIDE", model.config.vocab_size)
    if not kept:
        monkeypatch.setitem(head.KEPT_ELEMENTS, "cpu", 0)
    rows, ids = ragged(3, units=14, most=2, longest=15)
    expected = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, method="reference")
    copied: list[int] = []
    of = Bucket.of
    monkeypatch.setattr(
        Bucket, "of", lambda *given, **named: (copied.append(_wide_copy(*given)), of(*given, **named))[1]
    )
    found = clipped_sum(model, rows, ids, Clip(norm=0.5), objective=OBJECTIVE, max_tokens=200)
    assert_same(found, expected, TOLERANCE[torch.float32])
    assert not caplog.records, "the fast path was not taken"
    assert max(copied) < model.config.vocab_size


def _wide_copy(bucket: Bucket, vectors: torch.Tensor, zeroed: bool = False) -> int:
    """How wide the vectors are that a bucket copies; 0 if it copies none."""
    return vectors.shape[-1] if bucket.copied and vectors.ndim > 1 else 0


def test_narrow_vectors_are_filled_up_and_every_unit_is_there_once() -> None:
    lengths = np.array([4, 5, 5, 6, 6, 6, 20])
    segments = Segments(lengths, torch.device("cpu"))
    assert [bucket.units for bucket in segments.buckets_of(WIDE - 1)] == [bucket.units for bucket in segments.buckets]
    assert len(segments.buckets) < 4
    wide = segments.buckets_of(WIDE)
    assert [(b.units.start, b.units.stop, b.length, b.copied) for b in wide] == [
        (0, 1, 4, 0), (1, 3, 5, 0), (3, 6, 6, 0), (6, 7, 20, 0),
    ]  # fmt: skip
