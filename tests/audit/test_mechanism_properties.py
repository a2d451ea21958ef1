"""Every mechanism of the package has the properties that any owes, and each property can be found missing."""

import importlib
import sys
from collections.abc import Iterator

import pytest
from mechanism_properties import MechanismProperties

from fedsim.privacy.mechanisms import MECHANISMS


class TestGaussian(MechanismProperties):
    name = "gaussian"


class TestBanded(MechanismProperties):
    name = "banded"


class TestLayerNoise(MechanismProperties):
    name = "layer-noise"


class TestMatrixNoise(MechanismProperties):
    name = "matrix-noise"


class TestAdaptiveNoise(MechanismProperties):
    name = "adaptive-noise"
    options = ("exponent=0.5", "warmup=1")


class TestRandomisedLaplace(MechanismProperties):
    name = "randomised-laplace"


def test_every_mechanism_of_the_package_inherits_them() -> None:
    checked = {kind.name for kind in MechanismProperties.__subclasses__() if kind.__module__ == __name__}
    own = {name for name in MECHANISMS if ":" not in name}
    assert own <= checked, "a class of tests is missing above"


@pytest.fixture
def registered() -> Iterator[None]:
    """The broken mechanisms have names meanwhile."""
    known = dict(MECHANISMS._classes)
    importlib.import_module("broken_mechanisms")
    yield
    MECHANISMS._classes.clear()
    MECHANISMS._classes.update(known)
    del sys.modules["broken_mechanisms"]


LEFT_OUT = MechanismProperties.test_a_user_or_unit_left_out_moves_the_sum_by_its_clip_at_most
NOISE = MechanismProperties.test_every_sum_gets_noise_of_its_own_of_the_law_that_is_accounted
STATEMENT = MechanismProperties.test_the_statement_says_what_is_done
CANARY = MechanismProperties.test_the_worst_canary_does_not_contradict_the_certified_epsilon
RESUMED = MechanismProperties.test_a_run_goes_on_as_it_would_have_and_reuses_no_noise
TRAVELS = MechanismProperties.test_its_plan_travels
ELSEWHERE = MechanismProperties.test_another_process_draws_the_same_noise
BROKEN = {
    "twice-the-sum": (LEFT_OUT, "a unit reached 2 times as far as its clip"),
    "little-made-much": (LEFT_OUT, "units of tiny updates, left out, moved the sum by"),
    "half-the-noise": (NOISE, "noise has 0.5 of the standard deviation that is accounted"),
    "one-noise-for-all-values": (NOISE, "the noise of one sum shows in that of another"),
    "one-noise-for-all-rounds": (NOISE, "the noise of one sum shows in that of another"),
    "noise-that-is-not-centred": (NOISE, "noise is not of the law that is accounted"),
    "words-of-more-noise": (STATEMENT, "the statement says standard deviation 1.82, and it is 0.9"),
    "words-of-no-size": (STATEMENT, "the statement does not say how large the noise is"),
    "another-clip-than-planned": (STATEMENT, "clipped to L2 norm 0.7, and the statement says L2 norm 1.4"),
    "words-of-another-clip": (STATEMENT, "a unit reached L2 norm 0.7, and the statement says L2 norm 0.35"),
    "too-little-of-an-unknown-law": (CANARY, "This contradicts the claimed guarantee"),
    "peeking": (RESUMED, "learnt something that was not released"),
    "forgetful": (RESUMED, "a run that was resumed did not go on as one that was not"),
    "noise-of-this-object": (RESUMED, "got the noise of another sum"),
    "option-that-does-not-travel": (TRAVELS, "comes back as"),
    "option-that-is-no-field": (TRAVELS, "releases something else"),
    "noise-of-this-process": (ELSEWHERE, "another process releases something else"),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", BROKEN)
def test_a_mechanism_without_a_property_is_found_by_it(name: str) -> None:
    kind = type("Kind", (MechanismProperties,), {"name": f"broken_mechanisms:{name}", "__module__": name})
    the_property, words = BROKEN[name]
    with pytest.raises(AssertionError) as found:
        the_property(kind())
    assert words in str(found.value)
