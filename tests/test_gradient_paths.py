"""Which way gradients take is said: by the gradients, over messages, on the terminal, and never of anybody's text."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.clip import Clip
from fedsim.engine.messages import TrainReply
from fedsim.engine.replies import read_reply
from fedsim.engine.totals import BadReply
from fedsim.gradient_paths import GradientPaths, PathsHeard
from fedsim.gradients import CausalLanguageModel, LocalSteps, clipped_sum, gradient_paths
from fedsim.rows import TokenRows

sys.path.insert(0, str(Path(__file__).parent / "gradients"))
from gradient_checks import Around, Tables, ragged

WIDTH = 6


class Bypassing(torch.nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.layer.weight)


class Sorting(torch.nn.Module):
    """Hands a layer the tokens of all rows in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        order = flat[:, 0].argsort()
        return self.layer(flat[order])[order.argsort()].view(x.shape)


class MixesRows(torch.nn.Module):
    """A row's outputs depend on the other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + x.mean((0, 1), keepdim=True))


class Fails(torch.nn.Module):
    """Says in its error what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer._forward_hooks:
            raise ValueError(f"rows of {x.shape[1]} tokens, {float(x.detach().sum())}")
        return self.layer(x)


class Curved(torch.nn.Module):
    """Has no rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.power = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.power)


def told(model: torch.nn.Module, seed: int = 0, longest: int = 14, **arguments: Any) -> GradientPaths:
    rows, ids = ragged(seed, longest=longest)
    clipped_sum(model, rows, ids, Clip(norm=0.1), objective=CausalLanguageModel(), **arguments)
    found = gradient_paths(model)
    assert found is not None
    return found


def test_all_layers_fast() -> None:
    found = told(Tables(4, False, None))
    assert found.wholly_fast
    assert found.in_words() == "Gradients: all 3 layers fast"


def test_a_layer_without_a_rule_is_redone() -> None:
    model = Around(torch.nn.Sequential(Curved(), torch.nn.Linear(WIDTH, WIDTH), Curved()), WIDTH)
    found = told(model)
    assert found.in_words() == ("Gradients: 1 of 3 layers fast, 2 redone for each unit: layer.* (generic (Curved))")
    assert [(layers.name, layers.way, layers.count) for layers in found.layers] == [
        ("layer.*", "redone", 2),
        ("layer.*", "fast", 1),
    ]


@pytest.mark.parametrize(
    ("layer", "because"),
    [
        (Bypassing, "a parameter is used past the calls of the layer that holds it"),
        (Sorting, "layer.layer is called with vectors of unknown rows"),
        (MixesRows, "a pass over several units gives other gradients than plain autograd"),
        (Fails, "a pass over several units fails with ValueError"),
    ],
)
def test_the_reason_for_one_unit_after_the_other_is_of_the_model_alone(layer: type, because: str) -> None:
    """Whatever rows it was tried on, each word is the same."""
    of_others = []
    for seed, longest in ((0, 14), (1, 9), (2, 20)):
        torch.manual_seed(0)
        of_others.append(told(Around(layer(), WIDTH), seed, longest))
    assert of_others[0].because == because
    assert len(set(of_others)) == 1
    assert of_others[0].in_words().startswith(f"Gradients: unit after unit, because {because}; about ")
    assert {layers.way for layers in of_others[0].layers} == {"loop"}


@pytest.mark.parametrize("longest", [3, 30])
def test_nothing_is_said_of_how_long_rows_are(longest: int) -> None:
    """How norms are formed depends on it."""
    torch.manual_seed(0)
    model = Tables(24, True, None)
    assert told(model, longest=longest).to_json() == told(Tables(24, True, None)).to_json()


def test_what_was_asked_for_is_said_too() -> None:
    model = Tables(4, False, None)
    assert told(model, method="reference").because == "the reference path was asked for"
    assert "local steps" in told(model, local_steps=LocalSteps(steps=2, learning_rate=0.1)).because
    assert told(model).wholly_fast
    assert gradient_paths(Tables(4, False, None)) is None


def test_units_that_are_not_finite_tell_nothing() -> None:
    """Such a call takes the reference path, which depends on the text."""
    model = Tables(4, False, None)
    with torch.no_grad():
        model.position.weight[0] = float("nan")
    rows = TokenRows.from_lists([[1, 1, 1, 1], [1, 1, 1], [1, 1]])
    clipped_sum(model, rows, np.arange(3), Clip(norm=0.1), objective=CausalLanguageModel())
    assert gradient_paths(model) is None


FAST = GradientPaths.of({"model.layers.0.up": "linear", "model.layers.1.up": "linear", "head": "linear"}, set())
LOOP = GradientPaths.of({"model.layers.0.up": "linear", "head": "linear"}, set(), because="of something")


def test_a_message_carries_it() -> None:
    reply = TrainReply(round=3, units=np.arange(2), total=np.zeros(4, np.float32), statistics={}, paths=LOOP.to_json())
    assert GradientPaths.from_json(read_reply(reply.to_record()).paths) == LOOP
    for odd in ("[]", "{}", "nothing", '{"layers": [{"name": "x"}], "because": "", "packed": false}'):
        reply = TrainReply(round=3, units=np.arange(2), total=np.zeros(4, np.float32), statistics={}, paths=odd)
        with pytest.raises(BadReply):
            read_reply(reply.to_record())


def test_it_is_said_once_and_again_where_a_worker_differs_or_changes() -> None:
    said: list[str] = []
    kept: list[dict[str, Any]] = []
    heard = PathsHeard(said.append, kept.append)
    heard.hear(1, "")
    for _ in range(3):
        for worker in (1, 2):
            heard.hear(worker, FAST.to_json())
    assert said == ["Gradients: all 3 layers fast"]
    heard.hear(3, LOOP.to_json())
    assert said[1:] == [f"{LOOP.in_words()} (worker 3)"]
    heard.hear(2, LOOP.to_json())
    assert said[2:] == [f"{LOOP.in_words()} (worker 2 by now)"]
    heard.hear(2, LOOP.to_json())
    assert len(said) == 3
    ways = json.loads(json.dumps(kept[-1]))["gradients"]
    assert [(way["in_words"], way["workers"]) for way in ways] == [(FAST.in_words(), 1), (LOOP.in_words(), 2)]
    assert ways[0]["layers"][0] == {"name": "model.layers.*.up", "kind": "linear", "way": "fast", "count": 2}
