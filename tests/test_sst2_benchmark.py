"""The benchmark on SST-2: what each number of its table is worth, that it goes on, and its tables."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.sst2 import rows as trained_rows
from benchmarks.sst2.__main__ import Sst2Benchmark, main
from benchmarks.sst2.claims import (
    ESTIMATE,
    GUARANTEE,
    NONE,
    estimated_noise,
    gaussian_rounds,
    scalar_law,
    uneven_epsilon,
    vector_delta,
)
from benchmarks.sst2.rows import METHODS, Row, rows
from benchmarks.sst2.table import wilson
from fedsim.errors import InvalidInput
from fedsim.models.tokenizer import train_tokenizer
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.mechanisms.laplace.scalar import scalar_delta
from server.precautions.stopping import Stopped


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is drawn, and costs next to nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a film that is fine, or one that is not"] * 9, 300)
    end = tokenizer.eos_token_id
    shape = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end
    )
    small = GPT2LMHeadModel(shape)
    for part in (small, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "glue"
    folder.mkdir()
    for file, many in (("sst2_train.parquet", 600), ("sst2_dev.parquet", 40)):
        texts = [f"film number {place} is {'fine' if place % 2 else 'not fine'}" for place in range(many)]
        table = pa.table({"text": texts, "label": [place % 2 for place in range(many)]})
        pyarrow.parquet.write_table(table, folder / file)
    return folder


@pytest.fixture
def benchmark(model: Path, data: Path, tmp_path: Path) -> Sst2Benchmark:
    return Sst2Benchmark(
        data=data, output=tmp_path / "out", model=str(model), epsilons=(8.0,), delta=1e-4, seeds=(1,), rounds=5,
        cohort=32, dimensions=(1,),
    )  # fmt: skip


def test_every_method_is_trained_and_what_its_epsilon_is_worth_stands_beside(
    benchmark: Sst2Benchmark, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert benchmark.run() == 0
    printed = capsys.readouterr().out
    told = {one["method"]: one for one in map(json.loads, printed.splitlines()[: len(METHODS)])}
    assert list(told) == list(METHODS)
    assert told["non-private"]["epsilon"] is None
    assert told["non-private"]["worth"] == NONE
    for method in ("gaussian", "anadp", "lmo-dp"):
        assert told[method]["worth"] == GUARANTEE
        assert 7.9 < told[method]["epsilon"] <= 8
    assert told["anadp"]["noise_multiplier"] == told["gaussian"]["noise_multiplier"]
    assert 0 < told["anadp"]["least_scale"] < 1
    assert told["anadp"]["epsilon_without_whitening"] > told["anadp"]["epsilon"]
    assert told["ew-tune"]["claim_is"] == ESTIMATE
    assert told["ew-tune"]["epsilon"] > 8
    assert all(one["dev_rows"] == 40 for one in told.values())
    assert "| EW-Tune: Gaussian, σ by the Edgeworth estimate | 8 |" in printed
    assert json.loads(printed.splitlines()[-1])["rows"] == len(METHODS)

    monkeypatch.setattr(trained_rows, "trained", lambda config: pytest.fail("a finished row was trained again"))
    assert benchmark.run() == 0
    again = capsys.readouterr().out
    assert again.splitlines()[: len(METHODS)] == printed.splitlines()[: len(METHODS)]
    with pytest.raises(InvalidInput, match="the same clip_norm"):
        replace(benchmark, clip_norm=3.0).run()


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"sst2_train\.parquet"):
        Sst2Benchmark(data=tmp_path, output=tmp_path / "out").run()


@pytest.mark.parametrize("in_a_round", [True, False])
def test_one_that_is_ended_says_how_to_go_on(
    in_a_round: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> None:
        if in_a_round:
            raise Stopped(signal.SIGTERM, 1, "run")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("benchmarks.sst2.__main__.measured", ended)
    monkeypatch.setattr(sys, "argv", ["sst2", "--data", str(data), "--output", str(tmp_path / "out")])
    assert main() == 128 + signal.SIGTERM
    assert capsys.readouterr().err == (
        f"ended; the same command goes on behind the rows finished in {tmp_path / 'out'}\n"
    )


def test_a_table_that_is_cut_short_has_all_methods() -> None:
    found = rows((1.0, 8.0), (1, 2))
    assert found[0] == Row(method="non-private", epsilon=math.inf, seed=1)
    assert len(found) == 2 * (1 + 2 * 4)
    assert len({one.file for one in found}) == len(found)
    assert {one.seed for one in found[:9]} == {1}


def test_noise_by_the_estimate_has_that_estimate_and_is_worth_less() -> None:
    noise = estimated_noise(0.015, 30, 8.0, 1e-5)
    assert epsilon_bounds(gaussian_rounds(0.015, noise, 30), 1e-5).lower > 10


def test_uneven_noise_is_worth_what_its_least_is() -> None:
    even = epsilon_bounds(gaussian_rounds(0.05, 1.0, 6), 1e-5).upper
    assert uneven_epsilon(0.05, 1.0, [1.0] * 6, 1e-5) == pytest.approx(even, rel=2e-3)
    assert uneven_epsilon(0.05, 2.0, [0.5] * 6, 1e-5) == pytest.approx(even, rel=2e-3)
    some = uneven_epsilon(0.05, 1.0, [1.0, 1.0, 1.0, 0.5, 0.5, 0.5], 1e-5)
    assert even < some < uneven_epsilon(0.05, 1.0, [0.5] * 6, 1e-5)


def test_noise_that_hides_a_number_does_not_hide_a_vector() -> None:
    law = scalar_law(1.0)
    assert scalar_delta(law, 1.0) < 1e-9
    assert scalar_delta(law, 0.9) > 1e-5
    found, error = vector_delta(law, 1.0, 2_000)
    assert found - error > 0.1


def test_intervals_of_shares() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 10)[0] == 0.0
