"""Gaussian noise that is correlated over rounds, so that it cancels in part in the sums that training uses."""

from dataclasses import dataclass

from fedsim.privacy.mechanisms.banded.coefficients import norm_above
from fedsim.privacy.mechanisms.gaussian import Gaussian
from fedsim.privacy.mechanisms.mechanism import MECHANISMS


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Banded(Gaussian):
    """The plain Gaussian, which by itself asks for as many bands as promise the least noise (--plan.bands auto).

    Over how many rounds noise is correlated, and with which coefficients, is the plan's to say, for this mechanism as
    for any other whose noise is plainly Gaussian once the clip's scales are divided out.
    """

    name = "banded"
    summary = "the same Gaussian noise on every parameter, correlated over rounds (banded matrix factorization)"
    correlates = True


def correlation_in_words(coefficients: tuple[float, ...]) -> str:
    """What correlated noise is beside independent noise, as an addition to a sentence that says which noise is added.

    Args:
        coefficients: c, of at least two bands.
    """
    shown = ", ".join(f"{value:.4g}" for value in coefficients[1:4]) + (", …" if len(coefficients) > 4 else "")
    return (
        f", {norm_above(coefficients):.4g} times as strong as that and correlated over {len(coefficients)} rounds: a "
        f"round's noise, in units of its own clip, is fresh noise less {shown} times that of the rounds before it, "
        "so that those rounds together release what fresh noise hides"
    )
