"""Noise allocation follows released values alone, within bounds, and equal scales are the plain Gaussian."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms.allocation import AllocationSettings, ImportanceAllocator, equal_energy, normalised
from fedsim.privacy.mechanisms.blocks import Blocks

SIZES = {
    "transformer.h.0.attn.c_attn.weight": 48,
    "transformer.h.0.attn.c_attn.bias": 12,
    "transformer.h.0.mlp.lora_A.default.weight": 8,
    "transformer.h.0.mlp.lora_B.default.weight": 8,
    "transformer.h.1.attn.c_attn.weight": 48,
    "transformer.wte.weight": 100,
}
TOTAL = sum(SIZES.values())


def test_blocks_are_matrices_with_their_bias_and_each_lora_factor() -> None:
    blocks = Blocks.by_matrix(SIZES)
    assert blocks.labels == (
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.mlp.lora_A.default",
        "transformer.h.0.mlp.lora_B.default",
        "transformer.h.1.attn.c_attn",
        "transformer.wte",
    )
    assert blocks.block_sizes.tolist() == [60, 8, 8, 48, 100]
    assert Blocks.by_layer(SIZES).labels == ("transformer.h.0", "transformer.h.1", "transformer.wte")


def test_block_means_are_means_over_the_blocks_values() -> None:
    blocks = Blocks.by_layer(SIZES)
    flat = np.arange(TOTAL, dtype=np.float32)
    assert blocks.means(flat) == pytest.approx([flat[:76].mean(), flat[76:124].mean(), flat[124:].mean()])
    with pytest.raises(InvalidInput, match="flat"):
        blocks.means(flat[1:])


@settings(max_examples=100)
@given(scales=st.lists(st.floats(1e-6, 1e6), min_size=5, max_size=5), bound=st.floats(1.0, 100.0))
def test_normalised_scales_keep_the_noise_energy_and_the_bound(scales: list[float], bound: float) -> None:
    blocks = Blocks.by_matrix(SIZES)
    result = normalised(np.array(scales), blocks, bound)
    assert (result > 0).all()
    assert np.average(result**2, weights=blocks.block_sizes) == pytest.approx(1.0)
    assert result.max() / result.min() <= bound**2 * (1 + 1e-9)


def test_equal_scales_become_exactly_one() -> None:
    blocks = Blocks.by_matrix(SIZES)
    assert normalised(np.full(5, 0.37), blocks, 4.0).tolist() == [1.0] * 5


def test_equal_energy_gives_each_block_the_same_noise() -> None:
    blocks = Blocks.by_matrix(SIZES)
    energies = equal_energy(blocks, 100.0) ** 2 * blocks.block_sizes
    assert energies == pytest.approx(np.full(5, energies[0]))


def releases(seed: int, rounds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    loud = np.where(np.arange(TOTAL) < 60, 5.0, 1.0)
    return [
        ((loud * generator.standard_normal(TOTAL)).astype(np.float32), np.ones(TOTAL, dtype=np.float32))
        for _ in range(rounds)
    ]


def test_important_blocks_get_less_noise_within_the_bounds() -> None:
    allocator = ImportanceAllocator(Blocks.by_matrix(SIZES), AllocationSettings(bound=1.5))
    for released, parameters in releases(0, 12):
        allocator.observe(released, parameters)
    scales = allocator.scales
    assert scales[0] == scales.min()
    assert scales.max() / scales.min() <= 1.5**2 + 1e-9


def test_warm_up_and_exponent_zero_are_the_plain_gaussian() -> None:
    for allocation in (AllocationSettings(exponent=0.0), AllocationSettings(warmup=12)):
        allocator = ImportanceAllocator(Blocks.by_matrix(SIZES), allocation)
        for released, parameters in releases(1, 12):
            allocator.observe(released, parameters)
        assert allocator.scales.tolist() == [1.0] * 5


def test_smoothing_bounds_how_far_scales_move_in_a_round() -> None:
    slow = ImportanceAllocator(Blocks.by_matrix(SIZES), AllocationSettings(smoothing=0.99, warmup=0))
    fast = ImportanceAllocator(Blocks.by_matrix(SIZES), AllocationSettings(smoothing=0.0, warmup=0))
    for released, parameters in releases(2, 3):
        slow.observe(released, parameters)
        fast.observe(released, parameters)
    assert np.ptp(np.log(slow.scales)) < 0.1 * np.ptp(np.log(fast.scales))


def test_state_continues_where_it_stopped() -> None:
    rounds = releases(3, 8)
    whole = ImportanceAllocator(Blocks.by_matrix(SIZES))
    first, second = ImportanceAllocator(Blocks.by_matrix(SIZES)), ImportanceAllocator(Blocks.by_matrix(SIZES))
    for released, parameters in rounds[:4]:
        whole.observe(released, parameters)
        first.observe(released, parameters)
    second.load_state(first.state())
    for released, parameters in rounds[4:]:
        whole.observe(released, parameters)
        second.observe(released, parameters)
    assert second.scales.tolist() == whole.scales.tolist()
