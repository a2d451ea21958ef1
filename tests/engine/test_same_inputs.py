"""A worker that holds other data or another base model than the server refuses, on any engine, and is named."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from mock_clients import honest_reply, known_sum, request_for

from clients.answers import app_of
from clients.worker import Worker
from fedsim.config import EngineConfig, PlanConfig, RunConfig
from fedsim.data.config import DataConfig
from fedsim.engine.evaluation_messages import EvaluateRequest
from fedsim.engine.local import LocalGrid
from fedsim.engine.messages import TrainRequest, refusal_record
from fedsim.engine.same_inputs import Inputs, InputsDiffer, require_same_inputs
from fedsim.models.config import ModelConfig, SmallModelConfig
from fedsim.models.fingerprint import model_fingerprint, weights_fingerprint
from fedsim.privacy.ledger import read_entries
from server.app import train
from server.dispatch import Dispatcher, RoundFailed
from server.evaluation import EvaluationFailed

OURS = Inputs(data="d" * 32, model="m" * 64)
THEIRS = Inputs(data="e" * 32, model="m" * 64)
UNITS, COSTS = np.arange(30), np.ones(30)


def app_that_holds(inputs: dict[int, Inputs]) -> ClientApp:
    """Mock clients of which each compares the request with what its node holds, as a worker does."""
    made = ClientApp()
    made.asked = []  # type: ignore[attr-defined]

    @made.train()
    def train(message: Message, context: Context) -> Message:
        request = TrainRequest.from_record(message.content)
        made.asked.append(context.node_id)  # type: ignore[attr-defined]
        try:
            require_same_inputs(request.inputs, inputs[context.node_id])
        except InputsDiffer as refusal:
            return Message(refusal_record(refusal), reply_to=message)
        return Message(honest_reply(request).to_record(), reply_to=message)

    return made


@pytest.mark.parametrize("inputs", [None, OURS])
@pytest.mark.parametrize("seed", [0, 11, 2**62, 2**256 - 1])
def test_requests_carry_seeds_of_any_length_and_what_they_are_of(inputs: Inputs | None, seed: int) -> None:
    got = TrainRequest.from_record(request_for(UNITS, sampling_seed=seed, inputs=inputs).to_record())
    assert (got.sampling_seed, got.inputs) == (seed, inputs)
    sent = EvaluateRequest(split="test", rows=UNITS, parameters=np.zeros(3), inputs=inputs)
    assert EvaluateRequest.from_record(sent.to_record()).inputs == inputs


def test_what_differs_is_named_with_both_fingerprints() -> None:
    require_same_inputs(None, None)
    require_same_inputs(None, THEIRS)
    require_same_inputs(OURS, replace(OURS))
    with pytest.raises(
        InputsDiffer, match="its user store has the fingerprint eeeeeeeeeeee, the server's dddd"
    ) as told:
        require_same_inputs(OURS, THEIRS)
    assert "base model" not in str(told.value)
    with pytest.raises(InputsDiffer, match="its base model has the fingerprint aaaaaaaaaaaa"):
        require_same_inputs(OURS, replace(OURS, model="a" * 64))
    with pytest.raises(InputsDiffer, match="user store has the fingerprint unknown"):
        require_same_inputs(OURS, None)


def test_a_worker_that_differs_is_left_out_for_good_and_named() -> None:
    app = app_that_holds({1: OURS, 2: THEIRS, 3: OURS})
    dispatcher = Dispatcher(LocalGrid(app, workers=3))
    first = dispatcher.gather(request_for(UNITS, inputs=OURS), COSTS)
    second = dispatcher.gather(request_for(UNITS, round=1, inputs=OURS), COSTS)
    assert np.array_equal(first.total, known_sum(UNITS, 0, 40))
    assert np.array_equal(second.total, known_sum(UNITS, 1, 40))
    assert len(first.failures) == 1
    assert "worker 2 failed on 10 units: it refuses: its user store" in first.failures[0]
    assert not second.failures
    assert app.asked.count(2) == 1  # type: ignore[attr-defined]


def test_a_round_fails_that_nobody_can_compute_and_names_all() -> None:
    dispatcher = Dispatcher(LocalGrid(app_that_holds({1: THEIRS, 2: THEIRS}), workers=2))
    with pytest.raises(RoundFailed, match=r"worker 1 refuses: its user store.*worker 2 refuses: its user store"):
        dispatcher.gather(request_for(UNITS, inputs=OURS), COSTS)
    with pytest.raises(RoundFailed, match="no worker is left"):
        dispatcher.gather(request_for(UNITS, round=1, inputs=OURS), COSTS)


class Shaped(torch.nn.Linear):
    """A layer with a configuration as models of transformers have one."""

    def __init__(self, **values: Any) -> None:
        torch.manual_seed(0)
        super().__init__(3, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.config = type("Config", (), {"to_dict": lambda _: values})()


def fingerprint(model: torch.nn.Module) -> str:
    return model_fingerprint(model, weights_fingerprint(model))


def test_models_differ_by_configuration_by_every_weight_and_by_every_buffer_but_not_by_place() -> None:
    same = fingerprint(Shaped(act="gelu", _name_or_path="/a", transformers_version="1"))
    assert fingerprint(Shaped(act="gelu", _name_or_path="/b", transformers_version="2")) == same
    assert fingerprint(Shaped(act="relu")) != same
    for change in ("weight", "bias", "seen"):
        other = Shaped(act="gelu")
        with torch.no_grad():
            other.get_parameter(change).flatten()[-1:].add_(1e-7) if change != "seen" else other.seen[-1:].add_(1e-7)
        assert fingerprint(other) != same
    frozen = Shaped(act="gelu").requires_grad_(False)
    assert fingerprint(frozen) == same


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """A run on a file of forty users; beside it lies another without the first."""
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"user_id": user, "text": f"user {user} wrote message number {number} about everyday things"}
        for user in range(40)
        for number in range(3)
    ]
    for name, kept in (("here", rows), ("there", rows[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSIM_CACHE", str(folder / "cache"))
        yield RunConfig(
            data=DataConfig(source="files", path=str(folder / "here.jsonl"), sequence_length=16),
            model=ModelConfig(small=SmallModelConfig(layers=1, width=32, heads=2, vocabulary_size=300, steps=0)),
            plan=PlanConfig(gradients_per_round=16, rounds=1, delta=1e-2),
            engine=EngineConfig(kind="local", max_tokens=512),
        )


def changed(config: RunConfig, what: str) -> RunConfig:
    """The same configuration as a node reads it on which other files lie at its paths."""
    if what == "base model":
        return replace(config, model=replace(config.model, seed=7))
    return replace(config, data=replace(config.data, path=str(config.data.path).replace("here", "there")))


def two_nodes(config: RunConfig, what: str, kinds: tuple[str, ...]) -> LocalGrid:
    """Node 2 holds something else when it gets messages of these kinds, from the first message for training on."""
    ours, theirs = Worker.of(config), Worker.of(changed(config, what))
    apps, app = {True: app_of(lambda _: ours), False: app_of(lambda _: theirs)}, ClientApp()
    changed_by_now = {"train": "train" in kinds, "evaluate": "evaluate" in kinds and "train" in kinds}

    def answer(message: Message, context: Context, kind: str) -> Message:
        if kind == "train":
            changed_by_now["evaluate"] = "evaluate" in kinds
        return apps[context.node_id == 1 or not changed_by_now[kind]](message, context)

    for kind in changed_by_now:
        getattr(app, kind)()(partial(answer, kind=kind))
    app.query("trial")(lambda message, context: apps[True](message, context))  # before anything is charged
    return LocalGrid(app, workers=2)


@pytest.mark.parametrize("what", ["user store", "base model"])
def test_nodes_with_other_files_are_named_before_anything_is_charged(
    config: RunConfig, tmp_path: Path, what: str
) -> None:
    grid = two_nodes(config, what, ("train", "evaluate"))
    with pytest.raises(EvaluationFailed, match=f"^worker 2 refuses: its {what} has the fingerprint"):
        train(grid, replace(config, output=str(tmp_path)))
    assert not read_entries(tmp_path / "ledger.jsonl")


@pytest.mark.parametrize("kinds", [("train",), ("evaluate",)])
@pytest.mark.parametrize("what", ["user store", "base model"])
def test_a_node_that_comes_to_differ_adds_nothing_and_ends_nothing(
    config: RunConfig, tmp_path: Path, what: str, kinds: tuple[str, ...], caplog
) -> None:
    """One that is replaced while rounds are under way, say: seen in a round, or not until the model is measured."""
    seeds = {"sampling_seed": 1, "noise_seed": 2}
    train(two_nodes(config, what, ()), replace(config, output=str(tmp_path / "alike"), **seeds))
    assert "refuses" not in caplog.text
    train(two_nodes(config, what, kinds), replace(config, output=str(tmp_path / "differing"), **seeds))
    assert f"worker 2 refuses: its {what} has the fingerprint" in caplog.text
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("alike", "differing")]
    assert json.loads(lines[0])["loss"] == pytest.approx(json.loads(lines[1])["loss"], abs=1e-6)
