"""Tables whose rows are multiplied when they are looked up: the rule that finds them, and what memory it takes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_checks import TOLERANCE, VOCABULARY, Tables, assert_same, check, ragged
from torch.profiler import ProfilerActivity, profile

from fedsim.clip import Clip
from fedsim.gradients import CausalLanguageModel, clipped_sum
from fedsim.gradients.layers import rule_for
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments
from fedsim.gradients.rules import again


class Scaled(torch.nn.Embedding):
    """Named after nothing; by a number, or each feature by its own."""

    def __init__(self, scale: torch.Tensor, padding_idx: int | None = None) -> None:
        super().__init__(VOCABULARY, 8, padding_idx)
        self.register_buffer("by", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.by.to(self.weight.dtype)


class Normed(Scaled):
    """Not linear in the row."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(super().forward(input), dim=-1)


class Mixed(Scaled):
    """Linear in the row, feature by feature it is not."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).flip(-1)


class Shifted(Scaled):
    """Another row than the one that is asked for."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward((input + 1) % VOCABULARY)


class WithOffset(Scaled):
    """With something added that does not come from the row."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def around(table: torch.nn.Embedding) -> torch.nn.Module:
    model = Tables(8, True, None)
    model.token = table
    model.out.weight = table.weight
    return model.eval()


@pytest.mark.parametrize("scale", [torch.tensor(5.656), torch.linspace(-2, 3, 8)], ids=["number", "vector"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_table_that_scales_its_rows_has_a_rule(scale: torch.Tensor, padding_idx: int | None) -> None:
    torch.manual_seed(0)
    model = around(Scaled(scale, padding_idx))
    assert rule_for(model.token)[0] == "embedding"
    check(model)


@pytest.mark.parametrize("table", [Normed, Mixed, Shifted, WithOffset])
def test_a_table_that_does_anything_else_is_recomputed_unit_by_unit(table: type[Scaled]) -> None:
    torch.manual_seed(0)
    model = around(table(torch.tensor(2.0)))
    assert rule_for(model.token)[0] == f"generic ({table.__name__})"
    check(model, dtypes=[torch.float64])


class Numbered(Scaled):
    """Asked for more than an index, as tables of positions are."""

    def forward(self, input: torch.Tensor, ahead: int = 1) -> torch.Tensor:
        return torch.nn.functional.embedding((input + ahead) % VOCABULARY, self.weight)


class NumberedAndScaled(Numbered):
    def forward(self, input: torch.Tensor, ahead: int = 1) -> torch.Tensor:
        return super().forward(input, ahead) * self.by


class NumberedAndNormed(Numbered):
    def forward(self, input: torch.Tensor, ahead: int = 1) -> torch.Tensor:
        return torch.nn.functional.normalize(super().forward(input, ahead), dim=-1)


@pytest.mark.parametrize("table", [Numbered, NumberedAndScaled, NumberedAndNormed])
def test_what_a_table_was_found_to_be_it_is_in_later_passes(
    table: type[Scaled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not asked again: the second time it is known, and a pass that is not compared does not doubt."""
    torch.manual_seed(0)
    model = around(table(torch.tensor(3.0)).double()).double()
    assert rule_for(model.token)[0] == "positions"
    asked: list[bool] = []
    asking = again.functional_call

    def noted(module: Any, parameters: Any, *given: Any) -> Any:
        if parameters["weight"].stride(-1) == 0:  # a table of numbers
            asked.append(True)
        return asking(module, parameters, *given)

    monkeypatch.setattr(again, "functional_call", noted)
    times = []
    for seed in range(3):
        rows, unit_ids = ragged(seed)
        fast, slow = (
            clipped_sum(model, rows, unit_ids, Clip(norm=0.1), objective=CausalLanguageModel(), method=method)
            for method in ("fast", "reference")
        )
        assert_same(fast, slow, TOLERANCE[torch.float64])
        times.append(len(asked))
    assert times[0] > 0
    if table is not Numbered:
        assert times[2] == times[1] == times[0] == 1


def peak(step: Callable[[], object]) -> int:
    """Bytes that torch holds at most beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def test_a_gemma_takes_little_more_memory_than_the_loop() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=5000, pad_token_id=0, sliding_window=8,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    assert rule_for(model.get_input_embeddings())[0] == "embedding"
    rows, ids = ragged(units=12, longest=6, most=2)

    def total(method: str):
        return clipped_sum(
            model, rows, ids, Clip(norm=3.0), objective=CausalLanguageModel(), method=method, max_tokens=32
        )

    assert_same(total("fast"), total("reference"), TOLERANCE[torch.float32])
    assert peak(lambda: total("fast")) <= 1.5 * peak(lambda: total("reference"))


def test_what_is_looked_up_is_added_to_gradients_that_are_held() -> None:
    """And not to tables beside them, which of a large vocabulary would take as much again."""
    torch.manual_seed(0)
    units, tokens, words, width = 3, 20, 900, 64
    held, rows = torch.randn(units, words, width), torch.randn(units * tokens, width)
    index = torch.randint(words, (units * tokens,))
    gradients = UnitGradients(torch.Size([words, width]), units)
    gradients.add_held(held.clone())
    segments = Segments(np.full(units, tokens), torch.device("cpu"))
    assert peak(lambda: gradients.add_lookup(index, rows, segments)) < held.nbytes / 4
    owner = torch.arange(units).repeat_interleave(tokens)
    torch.testing.assert_close(gradients.take_held(), held.index_put((owner, index), rows, accumulate=True))
