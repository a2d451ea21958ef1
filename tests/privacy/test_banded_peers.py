"""Errors, optima and sensitivities beside those of jax-privacy.

The figures were computed with jax-privacy 2.0.0 (jax_privacy.matrix_factorization, 64-bit floats): toeplitz's
optimize_banded_toeplitz, loss, per_query_error and minsep_sensitivity_squared; buffered_toeplitz's optimize_loss with
LossFn.build_min_sep(error="mean"). All are square roots of what it returns.
"""

import pytest

from fedsim.privacy.mechanisms.banded.blt import BufferedToeplitz
from fedsim.privacy.mechanisms.banded.coefficients import (
    optimal_coefficients,
    participation_sensitivity,
    square_root_coefficients,
)
from fedsim.privacy.mechanisms.banded.workload import Workload


@pytest.mark.parametrize(
    ("rounds", "bands", "square_root", "optimum"),
    [
        (100, 2, 5.348993213218889, 5.181516045299959),
        (100, 16, 2.7057651104410274, 2.6629705388291818),
        (100, 64, 2.3465359241674064, 2.330360717450362),
        (200, 4, 5.690244672471702, 5.3358677831893795),
        (200, 32, 2.9302894321744333, 2.8777084649701075),
        (200, 128, 2.5654274886495694, 2.5491066351313294),
        (1000, 8, 9.426228766806753, 8.351642329405191),
        (1000, 128, 3.612999393668654, 3.5017492002446478),
        (2000, 2, 23.58789773916036, 22.455148913940448),
        (2000, 16, 9.970133226702092, 8.534628364849477),
        (2000, 64, 5.789490514138359, 5.125208054981705),
        (2000, 128, 4.591660260139125, 4.253252239584441),
    ],
)
def test_prefix_sums(rounds: int, bands: int, square_root: float, optimum: float) -> None:
    workload = Workload.prefix_sums(rounds)
    assert workload.error(square_root_coefficients(bands)) == pytest.approx(square_root, rel=1e-9)
    assert workload.error(optimal_coefficients(bands, workload)) == pytest.approx(optimum, rel=1e-7)


@pytest.mark.parametrize(("rounds", "bands", "error"), [(200, 16, 30.144645176007153), (2000, 32, 73.36766801219838)])
def test_momentum(rounds: int, bands: int, error: float) -> None:
    workload = Workload.of_optimizer("momentum", rounds, momentum=0.9)
    assert workload.error(square_root_coefficients(bands)) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(
    ("bands", "rounds", "separation", "participations", "sensitivity"),
    [
        (32, 100, 10, 5, 4.489696007280393),
        (32, 100, 10, 20, 6.593514914412491),
        (8, 50, 3, 7, 4.833549809814914),
        (128, 200, 20, 10, 8.272124466287822),
        (128, 128, 1, 128, 102.32960941292502),
    ],
)
def test_participation(bands: int, rounds: int, separation: int, participations: int, sensitivity: float) -> None:
    root = square_root_coefficients(bands)
    assert participation_sensitivity(root, rounds, separation, participations) == pytest.approx(sensitivity, rel=1e-12)


@pytest.mark.parametrize(
    ("rounds", "separation", "participations", "buffers", "error"),
    [
        (200, 20, 10, 2, 10.58468309033339),
        (200, 20, 10, 4, 10.581755614203647),
        (200, 50, 4, 3, 5.633157374707844),
        (1000, 100, 10, 2, 12.193851565550721),
    ],
)
def test_buffers(rounds: int, separation: int, participations: int, buffers: int, error: float) -> None:
    workload = Workload.prefix_sums(rounds)
    noise = BufferedToeplitz.optimal(buffers, workload, separation, participations)
    assert noise.error(workload, separation, participations) <= error * (1 + 1e-6)
