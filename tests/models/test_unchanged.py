import numpy as np
import pytest

from fedsim.errors import InvalidInput
from fedsim.models.unchanged import unchanged_parameters


def test_parameters_that_stayed_are_named(load) -> None:
    layout = load(lora_rank=2).layout
    before = np.zeros(layout.size, np.float32)
    assert unchanged_parameters(layout, before, before) == layout.names
    after = before.copy()
    after[layout.offsets[3] : layout.offsets[5]] = 1e-30
    assert set(layout.names) - set(unchanged_parameters(layout, before, after)) == set(layout.names[3:5])
    assert unchanged_parameters(layout, before, before + 1) == ()


def test_vectors_of_another_size_are_refused(load) -> None:
    layout = load().layout
    with pytest.raises(InvalidInput, match="after"):
        unchanged_parameters(layout, np.zeros(layout.size), np.zeros(3))
