"""What becomes of a model after it was tried is noticed, and so is whatever uses a parameter beside its layer."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY
from packed_attacks import CLIP, OBJECTIVE, off, rows_of
from packed_models import earlier, gemma2, llama

from fedsim.gradients import clipped_sum
from fedsim.gradients.fast import FastSum
from fedsim.gradients.trial.settings import settings_of
from fedsim.models.evaluate import evaluate
from fedsim.rows import TokenRows

ROWS = [12] * 20 + [9, 11, 7]


def summed(model: torch.nn.Module, rows: TokenRows, **arguments: object) -> torch.Tensor:
    return clipped_sum(model, rows, np.arange(len(rows)), CLIP, objective=OBJECTIVE, **arguments).total


class Sometimes(torch.nn.Module):
    """Uses a layer's weight beside the layer's own call, of one word alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        more = torch.nn.functional.linear(x, self.layer.weight)
        return self.head(torch.tanh(self.layer(x)) + 3 * more * (input_ids == 1)[..., None])


def test_a_use_of_a_called_layers_weight_that_no_tried_unit_makes_is_refused() -> None:
    """One user more, who is tried, would change what all others add."""
    lists = [rows_of([12], seed).tokens.tolist() for seed in range(20)]
    for tokens in lists[1:-1]:
        tokens[3] = 1
    lists[0], lists[-1] = lists[0][:9], lists[-1] * 2
    less, more = (
        summed(Sometimes().double().eval(), TokenRows.from_lists(rows), max_tokens=256)
        for rows in (lists, [*lists, [1] * 26])
    )
    assert float((more - less).norm()) <= CLIP.norm * (1 + 1e-6)


def test_a_module_whose_forward_pass_is_replaced_is_tried_again() -> None:
    """As libraries do that put quicker kernels into a model."""
    model, rows = llama().double(), rows_of(ROWS)
    summed(model, rows, max_tokens=256)
    block = model.model.layers[0].mlp
    own = type(block).forward
    block.forward = types.MethodType(lambda self, x: own(self, x) + 0.3 * earlier(1)(x), block)
    assert off(model, rows, (0, 21), max_tokens=256) < 1e-5


@pytest.mark.parametrize("way", ["clipped_sum", "evaluate"])
def test_a_head_whose_forward_pass_is_replaced_keeps_it(way: str) -> None:
    """As libraries do that move a layer's inputs to where its weights are."""
    model, rows = llama().double(), rows_of(ROWS)
    summed(model, rows, max_tokens=256)
    plain = evaluate(model, rows, OBJECTIVE).loss_sum

    def doubled(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.nn.Linear.forward(self, x)

    model.lm_head.forward = replaced = types.MethodType(doubled, model.lm_head)
    if way == "clipped_sum":
        found, expected = (summed(model, rows, max_tokens=256, method=method) for method in ("fast", "reference"))
        assert float((found - expected).norm()) <= 1e-9
    else:
        assert evaluate(model, rows, OBJECTIVE).loss_sum != pytest.approx(plain, rel=1e-6)
    assert vars(model.lm_head)["forward"] is replaced


def test_a_model_whose_hook_is_exchanged_for_another_is_tried_again() -> None:
    model, rows = llama().double(), rows_of(ROWS)
    table = model.get_input_embeddings()
    handle = table.register_forward_hook(lambda _, inputs, output: output + 0.1)
    summed(model, rows, max_tokens=256)
    handle.remove()
    table.register_forward_hook(lambda _, inputs, output: output + output.mean((0, 1), keepdim=True))
    found, expected = (summed(model, rows, max_tokens=256, method=method) for method in ("fast", "reference"))
    assert float((found - expected).norm()) <= 1e-9


class Mixes(torch.nn.Module):
    """Lets rows see each other as far as a buffer says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, VOCABULARY)
        self.register_buffer("mix", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        return self.head(torch.tanh(x + self.mix * x.mean((0, 1), keepdim=True)))


def test_a_model_whose_buffer_is_filled_is_tried_again() -> None:
    model, rows = Mixes().double().eval(), rows_of(ROWS)
    summed(model, rows, max_tokens=256)
    model.mix.fill_(1.0)
    found, expected = (summed(model, rows, max_tokens=256, method=method) for method in ("fast", "reference"))
    assert float((found - expected).norm()) <= 1e-9


def _capped_later() -> torch.nn.Module:
    model = gemma2()
    model.config.final_logit_softcapping = None
    evaluate(model, rows_of(ROWS), OBJECTIVE)
    model.config.final_logit_softcapping = 1.0
    return model


def test_a_head_is_plain_no_longer_once_its_logits_are_capped() -> None:
    fresh = gemma2()
    fresh.config.final_logit_softcapping = 1.0
    losses = [evaluate(model, rows_of(ROWS), OBJECTIVE).loss for model in (_capped_later(), fresh)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_units_alone_have_the_loss_of_the_model_as_it_is() -> None:
    model, rows = _capped_later(), rows_of([12] * 3)
    found, expected = (
        clipped_sum(model, rows, np.zeros(3, int), CLIP, objective=OBJECTIVE, max_tokens=16, method=method).norms
        for method in ("fast", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_a_model_that_is_refused_is_not_passed_again_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's trained tokens, where the trial's two units do not say them: their gradient arrives all the same, as
    zeros, so the trial could refuse what it did not reach."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])).eval()
    summed(model, rows_of(ROWS), max_tokens=256)
    passes: list[int] = []
    passed = FastSum.passed
    monkeypatch.setattr(FastSum, "passed", lambda self, units: (passes.append(len(units)), passed(self, units))[1])
    summed(model, rows_of(ROWS), max_tokens=256)
    assert not passes


def _adapted() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).eval()
    model.register_buffer("mix", torch.zeros(()))
    return model


def _layer(model: torch.nn.Module) -> torch.nn.Module:
    return next(module for module in model.modules() if hasattr(module, "lora_A"))


SETTINGS_CHANGED = {
    "a switch": lambda model: model.train(),
    "of a module far down": lambda model: setattr(_layer(model).lora_dropout.default, "training", True),
    "a number": lambda model: setattr(_layer(model), "out_features", 3),
    "a number in a collection": lambda model: _layer(model).scaling.update(default=3.0),
    "a word in a collection": lambda model: _layer(model).scaling.update(other=2.0),
    "a collection": lambda model: _layer(model).merged_adapters.append("default"),
    "a function": lambda model: setattr(_layer(model), "forward", lambda x: x),
    "a hook": lambda model: _layer(model).register_forward_hook(lambda *call: None),
    "a hook before": lambda model: _layer(model).register_forward_pre_hook(lambda *call: None),
    "a hook of the backward pass": lambda model: _layer(model).register_full_backward_hook(lambda *call: None),
    "a parameter": lambda model: setattr(_layer(model).base_layer, "weight", torch.nn.Parameter(torch.ones(2, 2))),
    "what is trained": lambda model: _layer(model).base_layer.weight.requires_grad_(True),
    "a dtype": lambda model: _layer(model).base_layer.double(),
    "a buffer's values": lambda model: model.mix.fill_(1.0),
    "a buffer": lambda model: setattr(model, "mix", torch.ones(())),
    "a module": lambda model: setattr(_layer(model), "base_layer", torch.nn.Identity()),
    "a module more": lambda model: model.add_module("more", torch.nn.Identity()),
    "a configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "a configuration within": lambda model: setattr(model.config.text_config, "rms_norm_eps", 0.5),
}


@pytest.mark.parametrize("changed", SETTINGS_CHANGED)
def test_settings_are_others_once_a_model_is_another_and_the_same_until_then(changed: str) -> None:
    model = _adapted()
    model.config.text_config = type(model.config)()
    before = settings_of(model)
    assert settings_of(model) == before
    assert hash(settings_of(model)) == hash(before)  # compiled passes are looked up by it
    SETTINGS_CHANGED[changed](model)
    assert settings_of(model) != before


def test_a_module_in_several_places_is_looked_at_once() -> None:
    """Of each further place only where it is is noted."""
    model = llama()
    shared = model.model.layers[0]
    once = settings_of(model)
    model.again = shared
    assert len(settings_of(model)) == len(once) + 2


def _tree() -> torch.nn.Module:
    """Two branches, of which the first has all there is."""
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Module(), torch.nn.Module()
    model.a.layer, model.a.other, model.a.setting = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), ["word", 2]
    model.a.register_buffer("mix", torch.zeros(()))
    model.b.layer = model.a.layer
    return model


def _moved(kind: str, one: tuple[str, str], other: tuple[str, str]) -> Callable[[torch.nn.Module], None]:
    """Something taken from where it is and put elsewhere."""

    def move(model: torch.nn.Module) -> None:
        members = [getattr(getattr(model, place), kind) for place, _ in (one, other)]
        members[1][other[1]] = members[0].pop(one[1])

    return move


MOVED = {
    "a module to another": _moved("_modules", ("a", "other"), ("b", "other")),
    "a module to another name": _moved("_modules", ("a", "other"), ("a", "renamed")),
    "another module in a second place": lambda model: setattr(model.b, "layer", model.a.other),
    "a buffer to another name": _moved("_buffers", ("a", "mix"), ("a", "renamed")),
    "a parameter to another name": lambda model: _moved("_parameters", ("layer", "bias"), ("layer", "b"))(model.a),
    "words of a list to attributes": lambda model: vars(model.a).update(setting=2, word=2),
    "a list to a tuple": lambda model: setattr(model.a, "setting", ("word", 2)),
}


@pytest.mark.parametrize("moved", MOVED)
def test_where_something_is_belongs_to_the_settings(moved: str) -> None:
    """A list of all there is, end to end, tells whose each thing is."""
    model = _tree()
    before = settings_of(model)
    MOVED[moved](model)
    assert settings_of(model) != before


def _function(model: torch.nn.Module) -> object:
    model.function = lambda x: x
    return model.function


def _buffer(model: torch.nn.Module) -> object:
    model._buffers.clear()
    model.register_buffer("mix", torch.rand(()))
    return model.mix


def _parameter(model: torch.nn.Module) -> object:
    model._parameters.clear()
    model.scale = torch.nn.Parameter(torch.rand(3))
    return model.scale


@pytest.mark.parametrize("exchange", [_function, _buffer, _parameter])
def test_what_is_put_where_something_was_in_memory_is_told_from_it(
    exchange: Callable[[torch.nn.Module], object],
) -> None:
    model, seen, addresses = torch.nn.Module(), [], []
    for _ in range(50):
        addresses.append(id(exchange(model)))
        seen.append(settings_of(model))
        assert settings_of(model) == seen[-1]
    assert len(set(addresses)) < len(seen)
    assert all(one != other for one, other in combinations(seen, 2))
    assert len({hash(one) for one in seen}) <= len(seen)  # of what is gone, too


@dataclass
class Called:
    """Cannot be hashed."""

    def __call__(self) -> None: ...


def test_settings_can_be_hashed_whatever_hangs_on_a_model() -> None:
    model = torch.nn.Module()
    model.called = Called()
    assert hash(settings_of(model)) == hash(settings_of(model))


class Branch(torch.nn.Module):
    """Its mean over rows and tokens is another's to use, or nobody's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mean(x.mean((0, 1), keepdim=True)) if hasattr(self, "mean") else x


class Branched(Mixes):
    """What its first branch makes of rows is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.busy = Branch(), Branch()
        self.idle.mean = torch.nn.Identity()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.busy(self.table(input_ids))))


def test_a_model_whose_module_is_moved_is_tried_again() -> None:
    model, rows = Branched().double().eval(), rows_of(ROWS)
    summed(model, rows, max_tokens=256)
    model.busy.mean = model.idle._modules.pop("mean")
    found, expected = (summed(model, rows, max_tokens=256, method=method) for method in ("fast", "reference"))
    assert float((found - expected).norm()) <= 1e-9


def test_settings_are_read_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of torch's own walks takes as long as all the rest, of a model with thousands of modules."""
    model, walks = _adapted(), []
    walk = torch.nn.Module.named_modules
    monkeypatch.setattr(
        torch.nn.Module, "named_modules", lambda self, *a, **k: (walks.append(self), walk(self, *a, **k))[1]
    )
    settings_of(model)
    assert len({id(module) for module in walks}) == len(walks)
