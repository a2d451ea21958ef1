"""The flat parameter vector."""

import numpy as np
import pytest
import torch
from gradient_checks import Tables

from fedsim.errors import InvalidInput
from fedsim.gradients import ParameterLayout


def test_flatten_and_load_are_inverse_and_tied_parameters_appear_once() -> None:
    model = Tables(4, True, None)
    layout = ParameterLayout.of(model)
    assert layout.names == ("token.weight", "position.weight")
    assert layout.size == 61 * 4 + 32 * 4
    assert list(layout.sizes.items()) == [("token.weight", 61 * 4), ("position.weight", 32 * 4)]
    flat = layout.flatten(model)
    assert flat.dtype == torch.float32
    other = Tables(4, True, None)
    ParameterLayout.of(other).load(other, flat.numpy())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    assert other.out.weight is other.token.weight


def test_frozen_parameters_do_not_travel() -> None:
    model = Tables(4, False, None)
    model.token.weight.requires_grad_(False)
    assert ParameterLayout.of(model).names == ("position.weight", "out.weight")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InvalidInput, match="trainable"):
        ParameterLayout.of(model)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_load_takes_read_only_arrays_and_tensors_and_keeps_dtype(as_tensor: bool, recwarn) -> None:
    model = Tables(4, False, None).to(torch.bfloat16)
    layout = ParameterLayout.of(model)
    values = np.arange(layout.size, dtype=np.float32)
    values.flags.writeable = as_tensor
    layout.load(model, torch.from_numpy(values) if as_tensor else values)
    assert model.token.weight.dtype == torch.bfloat16
    assert model.token.weight[0].tolist() == [0, 1, 2, 3]
    assert not recwarn.list


def test_views_write_to_the_vector() -> None:
    layout = ParameterLayout.of(Tables(4, True, None))
    flat = torch.zeros(layout.size)
    layout.views(flat)["position.weight"][1, 2] = 5
    assert flat[61 * 4 + 4 + 2] == 5


def test_what_does_not_fit_is_refused() -> None:
    model = Tables(4, True, None)
    layout = ParameterLayout.of(model)
    with pytest.raises(InvalidInput, match="flat"):
        layout.load(model, np.zeros(layout.size + 1, dtype=np.float32))
    with pytest.raises(InvalidInput, match="model"):
        layout.load(Tables(5, True, None), np.zeros(layout.size, dtype=np.float32))
