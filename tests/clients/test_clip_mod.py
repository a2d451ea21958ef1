"""The mod of nodes: one clipped difference leaves, by the house's own rule, and nothing else."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clients.mod import user_level_clip_mod
from fedsim.clip import Clip, ClipBlock
from fedsim.engine.grid import error_reply
from fedsim.engine.local import LocalGrid
from fedsim.engine.node_messages import ArrayLayout, NodeReply, NodeRequest
from fedsim.engine.totals import BadReply
from fedsim.errors import InvalidInput
from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.model import ParameterLayout

LocalGrid(lambda: __import__("clients.app", fromlist=["app"]).app, {})  # says who sends messages, as a SuperLink does
SENT = {"w": np.ones((2, 3)), "count": np.arange(2), "half": np.ones(4, dtype=np.float16)}
CONTEXT = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def record(values: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in values.items()})


def request(norm: float = 1.0, kind: str = "train", **more: Any) -> Message:
    config = NodeRequest(round=4, clip=Clip(norm=norm)).beside(ConfigRecord({"lr": 0.1}))
    return Message(RecordDict({"arrays": record(SENT), "config": config, **more}), dst_node_id=1, message_type=kind)


def answer(made: dict[str, np.ndarray], norm: float = 1.0) -> RecordDict:
    def app(message: Message, context: Context) -> Message:
        assert dict(message.content["config"]) == {"lr": 0.1}
        content = RecordDict({"model": record(made), "metrics": MetricRecord({"num-examples": 31})})
        return Message(content, reply_to=message)

    return user_level_clip_mod(request(norm), CONTEXT, app).content


def test_the_clipped_difference_alone_leaves() -> None:
    made = {**SENT, "w": SENT["w"] + 3, "count": SENT["count"] + 9, "half": SENT["half"] * 2}
    content = answer(made)
    reply = NodeReply.from_record(content)
    whole = np.concatenate([np.full(6, -3.0), np.full(4, -1.0)])
    assert reply.round == 4
    assert np.allclose(reply.update, whole / np.linalg.norm(whole), rtol=1e-4)
    assert sorted(content) == ["fedsim.reply", "fedsim.update"]
    assert dict(content["fedsim.reply"]) == {"round": 4}
    assert list(content["fedsim.update"]) == ["flat"]


def test_a_short_difference_is_not_changed() -> None:
    made = {**SENT, "w": SENT["w"] - 0.01}
    update = NodeReply.from_record(answer(made)).update
    assert np.array_equal(update, np.array([0.01] * 6 + [0] * 4).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_what_is_not_finite_becomes_zero(value: float) -> None:
    made = {**SENT, "w": np.full((2, 3), value)}
    assert not NodeReply.from_record(answer(made)).update.any()


def test_an_app_may_change_what_it_was_sent_in_place() -> None:
    def app(message: Message, context: Context) -> Message:
        message.content["arrays"]["w"] = Array(np.zeros((2, 3)))
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    update = NodeReply.from_record(user_level_clip_mod(request(100.0), CONTEXT, app).content).update
    assert np.array_equal(update, np.array([1.0] * 6 + [0] * 4, dtype=np.float32))


def test_other_messages_pass_and_errors_stay_errors() -> None:
    def app(message: Message, context: Context) -> Message:
        return Message(RecordDict({"m": MetricRecord({"x": 1})}), reply_to=message)

    assert "m" in user_level_clip_mod(request(kind="evaluate"), CONTEXT, app).content
    failed = user_level_clip_mod(request(kind="train.own"), CONTEXT, lambda m, c: error_reply(m, 2, "broken"))
    assert failed.has_error()


def test_nothing_is_trained_for_a_server_that_does_not_clip() -> None:
    content = RecordDict({"arrays": record(SENT), "config": ConfigRecord({"lr": 0.1})})
    message = Message(content, dst_node_id=1, message_type="train")
    trained = []
    with pytest.raises(InvalidInput, match="UserLevelDP"):
        user_level_clip_mod(message, CONTEXT, lambda m, c: trained.append(m))  # type: ignore[arg-type,return-value]
    assert not trained


def test_models_must_be_whole() -> None:
    with pytest.raises(BadReply, match="'w' is missing"):
        answer({"half": SENT["half"]})
    with pytest.raises(BadReply, match=r"shape \[3, 2\], not \[2, 3\]"):
        answer({**SENT, "w": SENT["w"].T})
    with pytest.raises(InvalidInput, match="message is 'of 2 array records'"):
        user_level_clip_mod(request(more=record(SENT)), CONTEXT, lambda m, c: m)
    with pytest.raises(InvalidInput, match="reply is 'of 0 array records'"):
        user_level_clip_mod(request(), CONTEXT, lambda m, c: Message(RecordDict({}), reply_to=m))
    for nothing in ({"count": np.arange(3)}, {"w": np.zeros((0, 3))}, {"z": np.ones(2, dtype=np.complex64)}):
        with pytest.raises(InvalidInput, match="initial_arrays"):
            ArrayLayout.of(record(nothing))


values = st.one_of(st.floats(-1e3, 1e3), st.floats(-1e-30, 1e-30), st.floats(-1e150, 1e150))
CLIPS = (
    Clip(norm=0.7),
    Clip(norm=0.7, order=1),
    Clip(norm=0.7, scales={"a": 0.5, "b": 3.0}),
    Clip(norm=0.7, blocks=(ClipBlock(parameters=("b",), share=0.6), ClipBlock(parameters=("a",), share=0.8))),
)


@settings(max_examples=200)
@given(update=hnp.arrays(np.float64, 7, elements=values), clip=st.sampled_from(CLIPS))
def test_the_clip_on_the_host_keeps_every_limit(update: np.ndarray, clip: Clip) -> None:
    sizes = {"a": 3, "b": 4}
    clipped = clip.applied(update, sizes)
    assert clipped.dtype == np.float32
    assert clip.reach(clipped.astype(np.float64), sizes) <= 1
    if clip.reach(update, sizes) < 1 - 1e-4:
        assert np.array_equal(clipped, update.astype(np.float32))


@pytest.mark.parametrize("clip", CLIPS)
def test_it_is_the_clip_of_fedsims_own_clients(clip: Clip) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))

    own = ModelClip(clip, ParameterLayout.of(Model()))
    rng = np.random.default_rng(2)
    for scale in (0.01, 0.3, 1.0, 40.0):
        update = (rng.normal(size=7) * scale).astype(np.float32)
        theirs = torch.from_numpy(update.copy())
        own.clip_(theirs)
        assert np.allclose(clip.applied(update, {"a": 3, "b": 4}), theirs.numpy(), rtol=1e-6, atol=1e-12)


def test_nodes_need_no_torch() -> None:
    code = "import sys, clients.mod; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
