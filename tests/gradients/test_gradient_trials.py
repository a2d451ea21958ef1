"""What a trial of a model must see, so that no unit reaches another's part of the sum, packed or padded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY
from packed_attacks import CLIP, OBJECTIVE, Around, off, rows_of
from packed_models import Leaky, earlier, gpt2, llama
from torch.nn.functional import pad

from fedsim.gradients import clipped_sum
from fedsim.gradients.fast import FastSum
from fedsim.gradients.rows.attention import attention_configs, packed_attention
from fedsim.gradients.rows.packed import PackedRows
from fedsim.gradients.trial import leaks
from fedsim.rows import TokenRows


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def scaled_by_length(kind: str) -> torch.nn.Module:
    """Whose rotary places depend on the longest row of a call: of Phi-3 and its like, past 40 tokens here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    longrope = {"short_factor": [1.0, 1.0], "long_factor": [3.0, 5.0], "original_max_position_embeddings": 40}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | (longrope if kind == "longrope" else {})
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, initializer_range=0.3, rope_parameters=rope,
        max_position_embeddings=40 if kind == "dynamic" else 200,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


MIXED = (10, 12, 20, 70, 11, 8)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_longer_than_a_quarter_of_the_budget_are_tried_at_their_length(kind: str) -> None:
    """Whose units have up to half the budget."""
    assert off(scaled_by_length(kind), rows_of(MIXED), (3,), max_tokens=150) < 1e-5


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_longer_than_those_tried_are_tried(kind: str) -> None:
    """Of as many tokens in all."""
    model, short = scaled_by_length(kind), rows_of((10, 12, 15, 9) * 16)
    clipped_sum(model, short, np.arange(len(short)), CLIP, objective=OBJECTIVE, max_tokens=512)
    assert off(model, rows_of(MIXED), (3,), max_tokens=512) < 1e-5


@pytest.mark.parametrize(
    "move",
    [
        lambda x: (x.shape[1] > 220) * 0.5 * torch.eye(x.shape[2], dtype=x.dtype)[3],
        lambda x: (x.shape[1] > 220) * 0.01 * x,
    ],
)
def test_a_model_that_counts_all_tokens_of_the_pass_is_not_packed(move: Callable[..., torch.Tensor]) -> None:
    """As scaling by the length of what is passed does, past some length; of code of somebody's own."""
    assert off(Leaky(move).double(), rows_of([12] * 20 + [9, 11, 7]), (0, 21), max_tokens=256) < 1e-5


def test_a_small_effect_of_the_place_in_the_micro_batch_is_not_packed() -> None:
    """It is the same for any other tokens."""

    def move(x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.arange(x.shape[2])
        return 5e-4 * torch.sin(places)[None]

    assert off(Leaky(move).double(), rows_of([12] * 20 + [9, 11, 7]), (0, 21), max_tokens=256) < 1e-5


class HidesPadding(Around):
    """Builds a mask of its own, in which nobody sees token 0 but itself."""

    def forward(self, input_ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        n = input_ids.shape[1]
        seen = (input_ids != 0)[:, None, None] | torch.eye(n, dtype=torch.bool)
        mask = torch.ones(n, n, dtype=torch.bool).tril() & seen
        return self.inner(input_ids, attention_mask=mask, **arguments).logits


@pytest.mark.usefixtures("any_code")
def test_a_mask_of_the_models_own_is_refused() -> None:
    """Whose upper left corner is no other row's."""
    rows = rows_of([12] * 20 + [9, 11, 7])
    for row in (0, 5):
        rows.tokens[rows.offsets[row] + 1 : rows.offsets[row + 1] : 4] = 0
    ids = np.arange(len(rows))
    model = HidesPadding(llama()).double()
    clipped_sum(model, rows_of([12] * 20 + [9, 11, 7]), ids, CLIP, objective=OBJECTIVE, max_tokens=256)
    assert off(model, rows, (0, 5, 7), max_tokens=256) < 1e-5


def wordy() -> torch.nn.Module:
    """With words enough that a random one is seldom a certain one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=5000, bos_token_id=1, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


class Sorts(Around):
    """Puts tokens of one kind behind the others for a layer, and back: outputs of rows depend on nobody."""

    def __init__(self) -> None:
        super().__init__(wordy())
        self.extra = torch.nn.Linear(16, 16)
        self.inner.transformer.h[0].register_forward_hook(lambda _, inputs, output: output + self.move(output))
        self.eval()

    def move(self, x: torch.Tensor) -> torch.Tensor:
        order = torch.argsort((self.ids[0] == 1).long(), stable=True)
        return self.extra(x[:, order])[:, torch.argsort(order)]

    def forward(self, input_ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        self.ids = input_ids
        return super().forward(input_ids, **arguments)


def test_tokens_that_an_index_has_picked_are_of_unknown_order() -> None:
    """Of packed tokens that nobody's own code may have sorted."""
    rows = rows_of([12] * 20 + [9, 11, 7], words=5000)
    model, ids = Sorts().double(), np.arange(len(rows))
    clipped_sum(model, rows, ids, CLIP, objective=OBJECTIVE, max_tokens=256)
    for row in (3, 8, 14):
        rows.tokens[rows.offsets[row] + 1 : rows.offsets[row + 1] : 2] = 1
    assert off(model, rows, (3, 8), max_tokens=256) < 1e-5


class Backwards(torch.autograd.Function):
    """The identity, whose gradient takes a little of the next token's."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1e-3 * pad(gradient, (0, 0, 0, 1))[:, 1:]


@pytest.mark.usefixtures("any_code")
def test_a_leak_of_the_backward_pass_alone_is_not_packed() -> None:
    model = Leaky(lambda x: Backwards.apply(x) - x.detach()).double()
    assert off(model, rows_of([12] * 20 + [9, 11, 7]), (0, 21), max_tokens=256) < 1e-5


@pytest.mark.parametrize("number", [5, 6, 8, 16])
def test_any_two_rows_of_a_trial_are_told_apart(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some exchange has to change the one and keep the other."""
    chosen = []
    exchanged = leaks.LeakTrial.exchanged

    def seen(self: object, rows: np.ndarray, generator: np.random.Generator) -> TokenRows:
        chosen.append(rows.copy())
        return exchanged(self, rows, generator)

    monkeypatch.setattr(leaks.LeakTrial, "exchanged", seen)
    monkeypatch.setattr(leaks, "LEAST_ROWS", number)
    rows = rows_of([8] * number)
    assert leaks.LeakTrial(gpt2(), None, [], rows, 8 * number, None).leak() == ""
    apart = np.zeros((number, number), bool)
    for c in chosen:
        apart |= c[:, None] & ~c[None]
    assert (apart | np.eye(number, dtype=bool)).all()


def test_another_model_of_the_same_configuration_is_left_alone() -> None:
    """As a thread beside would use it: its rows are taken for those of the pass."""
    one = llama()
    other = type(one)(one.config).eval()
    tokens = torch.arange(1, 13)[None]
    expected = other(tokens).logits
    with packed_attention(attention_configs(one), PackedRows(np.array([3, 9]), torch.device("cpu"))):
        torch.testing.assert_close(other(tokens).logits, expected)


def test_two_passes_of_one_configuration_leave_it_as_it_was() -> None:
    """The first to begin is the first to end, as two threads' may be."""
    one = llama()
    other, before = type(one)(one.config).eval(), one.config._attn_implementation
    rows = PackedRows(np.array([3, 9]), torch.device("cpu"))
    first, second = packed_attention(attention_configs(one), rows), packed_attention(attention_configs(other), rows)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert one.config._attn_implementation == before


@pytest.mark.usefixtures("any_code")
@pytest.mark.parametrize("kind", ["a hook", "a layer that was zero"])
def test_a_model_that_is_changed_is_tried_again(kind: str) -> None:
    """Or what it may yet become was seen before: a layer that is zero hides what it is given."""
    model, rows = Around(gpt2()), rows_of([12] * 20 + [9, 11, 7])
    shift = torch.nn.Linear(16, 16, bias=False)
    torch.nn.init.zeros_(shift.weight)
    block = model.inner.transformer.h[0]
    if kind != "a hook":
        model.shift = shift
        block.register_forward_hook(lambda _, inputs, output: output + shift(1e-4 * earlier(1)(output)))
    model.double()
    clipped_sum(model, rows, np.arange(len(rows)), CLIP, objective=OBJECTIVE, max_tokens=256)
    torch.nn.init.normal_(shift.weight, std=3e3)
    if kind == "a hook":
        block.register_forward_hook(lambda _, inputs, output: output + 0.3 * earlier(1)(output))
    assert off(model, rows, (0, 21), max_tokens=256) < 1e-5


def test_a_parameter_that_the_trial_never_reached_is_not_left_out() -> None:
    """Trained tokens of PEFT, which bypass their layer and no tried unit says: were they left out until one user more
    says them, all others' updates would change."""
    from peft import LoraConfig, get_peft_model

    def total(lists: list[list[int]]) -> torch.Tensor:
        lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], init_lora_weights=False)
        model = get_peft_model(llama(), lora).double().eval()
        rows = TokenRows.from_lists(lists)
        return clipped_sum(model, rows, np.arange(len(rows)), CLIP, objective=OBJECTIVE, max_tokens=256).total

    lists = [rows_of([12], seed).tokens.tolist() for seed in range(20)]
    for tokens in lists[1:-1]:
        tokens[3] = 1
    lists[0], lists[-1] = lists[0][:9], lists[-1] * 2  # the shortest and the longest, that are tried
    assert float((total([*lists, [1] * 26]) - total(lists)).norm()) <= CLIP.norm * (1 + 1e-6)


def test_a_trial_for_which_there_is_no_memory_is_made_smaller() -> None:
    """As a pass is."""

    def move(x: torch.Tensor) -> torch.Tensor:
        if x.shape[:2].numel() > 90:
            raise torch.OutOfMemoryError
        return torch.zeros_like(x)

    rows = rows_of([12] * 20)
    clipped_sum(Leaky(move), rows, np.repeat(np.arange(4), 5), CLIP, objective=OBJECTIVE, max_tokens=256)


class SeesPadding(torch.nn.Module):
    """No causal model: every token sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, VOCABULARY)
        with torch.no_grad():
            self.table.weight[-1] = float("inf")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        return self.head(torch.tanh(self.layer(x + x.mean(1, keepdim=True))))


def test_a_unit_that_is_not_finite_does_not_spare_a_model_the_trial() -> None:
    """With nothing to compare by, the fast path would be taken untried."""
    model, rows = SeesPadding().double().eval(), rows_of([12, 5, 7, 9, 3, 8, 6, 4, 10], words=VOCABULARY - 1)
    rows.tokens[5] = VOCABULARY - 1  # of the longest unit, which would have been tried
    found, expected = (
        clipped_sum(model, rows, np.arange(len(rows)), CLIP, objective=OBJECTIVE, method=method)
        for method in ("fast", "reference")
    )
    assert float((found.total - expected.total).norm()) <= 1e-9


def test_one_unit_that_is_not_finite_does_not_end_packing_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[bool] = []
    passed = FastSum.passed
    monkeypatch.setattr(FastSum, "passed", lambda self, units: (ran.append(self.packed), passed(self, units))[1])
    model, rows = llama(), rows_of([11] + [12] * 20 + [13], words=VOCABULARY - 1)
    rows.tokens[30] = VOCABULARY - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = float("inf")
    for called in (rows, rows.take(np.arange(4, 20))):
        clipped_sum(model, called, np.arange(len(called)), CLIP, objective=OBJECTIVE, max_tokens=512)
    assert ran[-1]
