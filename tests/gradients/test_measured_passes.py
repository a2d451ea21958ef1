"""Micro-batches as large as memory allows: what passes took, what one leaves behind, and running out of it."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gradient_checks import Tables, assert_same, ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum, fast, sums
from fedsim.gradients.fast import FastSum, Pass
from fedsim.gradients.trial import verdict
from fedsim.gradients.units import GPU_TOKENS, SHARE, make_units, measured_pass, token_budget, token_bytes

CUDA = torch.device("cuda")
HALF = torch.bfloat16


@dataclass
class Memory:
    """Of a device that is not there, in bytes: all, held for whoever asks next, in use, and in use at most."""

    total: int
    reserved: int = 0
    allocated: int = 0
    peak: int = 0

    def use(self, number: int) -> None:
        """Take so many bytes and give them back."""
        self.peak = max(self.peak, self.allocated + number)

    def reset(self) -> None:
        self.peak = self.allocated


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """What torch says of the memory of its GPU."""
    device = Memory(total=80 * 2**30)
    told: dict[str, Callable[[], object]] = {
        "mem_get_info": lambda: (device.total - max(device.reserved, device.allocated), device.total),
        "memory_reserved": lambda: max(device.reserved, device.allocated),
        "memory_allocated": lambda: device.allocated,
        "max_memory_allocated": lambda: device.peak,
        "reset_peak_memory_stats": device.reset,
    }
    for name, function in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda of, function=function: function())
    return device


def take(
    memory: Memory, model: torch.nn.Module, tokens: int, each: float, autocast: torch.dtype | None = None
) -> None:
    """A pass of so many tokens that takes so many bytes for each."""
    with measured_pass(model, CUDA, tokens, autocast):
        memory.use(int(tokens * each))


def mostly_frozen() -> torch.nn.Module:
    """A model whose estimate is large, for parameters that leave nothing behind."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 2048).requires_grad_(False) for _ in range(40)))
    return model.append(torch.nn.Linear(8, 8))


def test_a_model_whose_tokens_cost_less_than_estimated_gets_larger_micro_batches(memory: Memory) -> None:
    memory.total = 2**33
    model = mostly_frozen()
    before = token_budget(model, CUDA, None)
    assert before == largest_power(SHARE * memory.total / token_bytes(model, None)) < GPU_TOKENS
    each = token_bytes(model, None) // 16
    take(memory, model, 100, each)
    assert before < token_budget(model, CUDA, None) == min(GPU_TOKENS, largest_power(SHARE * memory.total / each))
    take(memory, model, 101, 1.0)
    assert token_budget(model, CUDA, None) == GPU_TOKENS


def test_a_model_whose_tokens_cost_more_than_estimated_gets_smaller_ones(memory: Memory) -> None:
    model = torch.nn.Linear(8, 8)
    assert token_budget(model, CUDA, None) == GPU_TOKENS
    take(memory, model, 10, 2**24)
    assert token_budget(model, CUDA, None) == largest_power(SHARE * memory.total / 2**24)


@pytest.mark.parametrize(("width", "tokens"), [(8, 4096), (4096, 4096), (4097, 1024), (2**20, 1024)])
def test_on_a_cpu_micro_batches_of_small_models_are_larger(width: int, tokens: int) -> None:
    model = torch.nn.Linear(width, width, device="meta")
    assert token_budget(model, torch.device("cpu"), None) == tokens
    assert token_budget(model.half(), torch.device("cpu"), None) == (4096 if width <= 8192 else 1024)


def test_a_model_without_matrices_has_a_budget(memory: Memory) -> None:
    model = torch.nn.LayerNorm(8)
    assert token_budget(model, torch.device("cpu"), None) == 4096
    assert token_budget(model, CUDA, None) == GPU_TOKENS


@settings(max_examples=200)
@given(free=st.integers(0, 2**38), each=st.floats(1, 2**40), held=st.integers(0, 2**36))
def test_a_budget_is_the_largest_power_of_two_that_fits(free: int, each: float, held: int) -> None:
    """What is in use is not free; what torch holds and nobody uses is."""
    model = torch.nn.Linear(8, 8)
    with pytest.MonkeyPatch.context() as patch:
        memory = memory_of(patch)
        memory.total, memory.allocated, memory.reserved = free + held, held, held + free // 3
        take(memory, model, 10, each)
        found = token_budget(model, CUDA, None)
    used = int(10 * each) / 10
    assert found == min(GPU_TOKENS, largest_power(SHARE * free / used))
    assert found >= 1


def memory_of(patch: pytest.MonkeyPatch) -> Memory:
    return memory.__wrapped__(patch)  # type: ignore[attr-defined]


def largest_power(number: float) -> int:
    """The largest power of 2 that is not above the number, 1 at least."""
    power = 1
    while 2 * power <= number:
        power *= 2
    return power


def test_what_the_largest_pass_took_is_kept_by_model_and_by_autocast(memory: Memory) -> None:
    memory.total = 2**30
    model, other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    untouched = token_budget(other, CUDA, None), token_budget(model, CUDA, None, HALF)

    def budget() -> int:
        return token_budget(model, CUDA, None)

    take(memory, model, 10, 2**20)
    first = budget()
    take(memory, model, 10, 2**22)
    assert budget() == first
    take(memory, model, 20, 2**18)
    assert budget() == 4 * first
    take(memory, model, 40, 2**19)
    assert budget() == 2 * first, "a larger pass counts, though its tokens took more"
    take(memory, model, 10, 2**21, HALF)
    assert budget() == 2 * first
    assert token_budget(model, CUDA, None, HALF) == first // 2 < untouched[1]
    assert token_budget(other, CUDA, None) == untouched[0]


def test_a_pass_counts_only_what_it_took_itself(memory: Memory) -> None:
    model = torch.nn.Linear(8, 8)
    memory.allocated, memory.peak = 2**30, 2**36  # the model, and an earlier pass of another
    take(memory, model, 64, 2**21)
    assert token_budget(model, CUDA, None) == largest_power(SHARE * (memory.total - 2**30) / 2**21)


def test_a_pass_that_ran_out_of_memory_tells_nothing(memory: Memory) -> None:
    model = torch.nn.Linear(8, 8)
    before = token_budget(model, CUDA, None)

    def run_out() -> None:
        with measured_pass(model, CUDA, 10, None):
            memory.use(2**36)
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        run_out()
    assert token_budget(model, CUDA, None) == before


def test_a_size_that_is_asked_for_is_taken(memory: Memory) -> None:
    model = torch.nn.Linear(8, 8)
    take(memory, model, 1, 2**35)
    for tokens in (1, 1000, 10**6):
        assert token_budget(model, CUDA, tokens) == tokens


def on_a_gpu(patch: pytest.MonkeyPatch, memory: Memory, each: float) -> list[int]:
    """Let sums on a CPU size their micro-batches as on a GPU where a token takes so much; the tokens of its passes."""
    tokens: list[int] = []
    passed = FastSum.passed

    def taking(self: FastSum, units: np.ndarray) -> Pass:
        tokens.append(self.tokens(units))
        memory.use(int(each * tokens[-1]))
        return passed(self, units)

    patch.setattr(FastSum, "passed", taking)
    for module in (fast, verdict):
        patch.setattr(module, "measured_pass", lambda model, _, *rest: measured_pass(model, CUDA, *rest))
    patch.setattr(sums, "token_budget", lambda model, _, *rest: token_budget(model, CUDA, *rest))
    return tokens


def test_the_first_sum_already_goes_by_what_its_trial_took(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, (rows, ids) = Tables(8, False, None), ragged(units=40, most=3)
    memory.total = token_bytes(model, None) * 120
    estimated = token_budget(model, CUDA, None)
    assert estimated == 64
    passes = on_a_gpu(monkeypatch, memory, token_bytes(model, None) / 8)

    def total() -> torch.Tensor:
        return clipped_sum(model, rows, ids, Clip(norm=0.1), objective=CausalLanguageModel()).total

    first = total()
    trial, *rest = passes
    assert trial <= estimated < max(rest) <= 8 * estimated
    passes.clear()
    assert torch.equal(total(), first)
    assert passes == rest  # the same units meet from call to call


def sum_of(model: torch.nn.Module, budget: int) -> FastSum:
    rows, ids = ragged(units=24, most=3)
    objective = CausalLanguageModel()
    return FastSum(
        model, rows, make_units(rows, ids, objective, "examples", None), objective, Clip(norm=0.1), budget, None
    )


def test_a_pass_is_gone_when_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its last name, not when the collector comes by: its activations fill the device."""
    torch.manual_seed(0)
    left: list[weakref.ref[object]] = []
    passed, add_alone = FastSum.passed, FastSum.add_alone
    alone: list[int] = []

    def watching_alone(self: FastSum, unit: int) -> None:
        assert not [ref() for ref in left if ref() is not None]
        alone.append(unit)
        add_alone(self, unit)

    def watching(self: FastSum, units: np.ndarray) -> Pass:
        assert not [ref() for ref in left if ref() is not None]
        found = passed(self, units)
        gradients = found.gradients.matrices.values()
        tensors = [x for g in gradients for x in (g.held, *(x for _, pair in g.outers for x in pair)) if x is not None]
        left.extend(map(weakref.ref, (found, found.gradients, *tensors)))
        return found

    monkeypatch.setattr(FastSum, "passed", watching)
    monkeypatch.setattr(FastSum, "add_alone", watching_alone)
    asked = sum_of(Tables(48, True, None), 70)
    gc.collect()
    gc.disable()
    try:
        asked.run()
    finally:
        gc.enable()
    assert len(left) > 20
    assert alone


@pytest.mark.parametrize("failing", [{0}, {0, 1, 2}, {1, 2}, {0, 3}], ids=str)
def test_running_out_of_memory_counts_every_unit_once(failing: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a pass; what it had taken is free by the time the device is asked to give it back."""
    torch.manual_seed(0)
    model = Tables(48, True, None)
    expected = sum_of(model, 200).run()
    passed = FastSum.passed
    added: list[np.ndarray] = []
    lost: list[weakref.ref[Pass]] = []
    emptied: list[bool] = []

    def running_out(self: FastSum, units: np.ndarray) -> Pass:
        found = passed(self, units)
        if len(added) + len(lost) in failing:
            lost.append(weakref.ref(found))
            raise torch.OutOfMemoryError("no room")
        added.append(units)
        return found

    monkeypatch.setattr(FastSum, "passed", running_out)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(all(ref() is None for ref in lost)))
    asked = sum_of(model, 200)
    assert_same(asked.run(), expected, 1e-6)
    assert asked.budget == 200 // 2 ** len(failing)
    assert sorted(np.concatenate(added)) == np.flatnonzero(asked.units.counts).tolist()
    assert emptied == [True] * len(failing)


def test_a_single_unit_that_has_no_room_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: FastSum, units: np.ndarray) -> Pass:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(FastSum, "passed", no_room)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        sum_of(Tables(8, False, None), 200).run()
