import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, public_texts
from transformers import GPT2Config, GPT2LMHeadModel

from fedsim.errors import InvalidInput
from fedsim.models.pretrain import pack_rows, pretrain
from fedsim.models.small import INITIAL_SPREAD, small_model_folder
from fedsim.rows import IGNORED_LABEL

SEPARATOR = 0


def initialised() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(shape).eval()


def repetitive_rows():
    return pack_rows([[1, 2, 3, 4, 5, 6, 7, 8] * 4] * 40, context=16, separator=SEPARATOR, seed=0)


def trained(threads: int, seed: int = 0, steps: int = 10) -> tuple[list[float], torch.Tensor]:
    model = initialised()
    config = dataclasses.replace(TINY, steps=steps, batch_rows=10)
    history = pretrain(model, repetitive_rows(), config, seed=seed, threads=threads, progress=False)
    return history, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@given(st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=20), st.integers(2, 12))
def test_packing_keeps_every_token_once(texts: list[list[int]], context: int) -> None:
    rows = pack_rows(texts, context, SEPARATOR, seed=0)
    scored = rows.labels[rows.labels != IGNORED_LABEL]
    assert (rows.tokens[rows.labels != IGNORED_LABEL] == scored).all()
    assert sorted(scored[scored != SEPARATOR]) == sorted(token for text in texts for token in text)
    assert len(scored) == sum(1 + len(text) for text in texts)
    assert (rows.lengths == context).all()


def test_pretraining_learns_from_context() -> None:
    # Eight tokens in turn: a model blind to the token before cannot do better than log 8.
    history, _ = trained(threads=1, steps=80)
    assert history[-1] < 0.5 * np.log(8)


def test_the_weights_are_the_same_on_any_number_of_threads() -> None:
    one, weights = trained(threads=1)
    for threads in (2, 3):
        history, others = trained(threads)
        assert history == one
        assert torch.equal(others, weights)


def test_another_seed_reads_in_another_order() -> None:
    texts = [[1 + number, 2, 3] for number in range(12)]
    orders = [pack_rows(texts, 8, SEPARATOR, seed).tokens.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_pretraining_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    trained(2)
    assert torch.get_num_threads() == before


def make(cache: Path, texts=public_texts, **fields) -> Path:
    config = dataclasses.replace(TINY, **({"steps": 2} | fields))
    return small_model_folder(config, texts=texts, cache=cache, threads=1, progress=False)


def test_the_cache_is_found_again_and_keyed_by_all_that_matters(tmp_path: Path, monkeypatch) -> None:
    first = make(tmp_path)
    assert (first / "model.safetensors").exists()
    monkeypatch.setattr("fedsim.models.small.pretrain", lambda *a, **k: pytest.fail("trained again"))
    assert make(tmp_path) == first
    monkeypatch.undo()
    assert make(tmp_path, steps=3) != first
    assert make(tmp_path, texts=lambda: ["another text, and more of it"]) != first
    # Texts are told apart from their concatenation.
    assert make(tmp_path, texts=lambda: ["ab", "c"]) != make(tmp_path, texts=lambda: ["a", "bc"])


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments, **settings):
        raise RuntimeError("power cut")

    monkeypatch.setattr("fedsim.models.small.pretrain", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        make(tmp_path)
    assert not [path for path in (tmp_path / "models").iterdir() if path.is_dir()]


def test_those_who_ask_at_once_share_one_training(tmp_path: Path, monkeypatch) -> None:
    trainings = []

    def counted(*arguments, **settings):
        trainings.append(1)
        return pretrain(*arguments, **settings)

    monkeypatch.setattr("fedsim.models.small.pretrain", counted)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: make(tmp_path), range(3)))
    assert len(folders) == len(trainings) == 1


def test_no_text_or_no_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="public_texts"):
        make(tmp_path, texts=lambda: ["", "  "])
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="FEDSIM_CACHE"):
        make(tmp_path / "file")


def test_zero_steps_keep_the_initial_weights(tmp_path: Path) -> None:
    folder = make(tmp_path, steps=0)
    model = GPT2LMHeadModel.from_pretrained(folder)
    assert np.isclose(model.transformer.wte.weight.std().item(), INITIAL_SPREAD, rtol=0.1)
