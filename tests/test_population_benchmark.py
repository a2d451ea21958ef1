"""The benchmark of the paper's population, with few users and in one process."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.population import PopulationBenchmark
from fedsim.models.tokenizer import train_tokenizer
from fedsim.phases import Times


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is drawn, and costs next to nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["some text of nobody, and more of it"] * 9, 300)
    small = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2))
    for part in (small, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_way_from_texts_to_a_model_is_told_phase_by_phase(model: Path, tmp_path: Path, capfd) -> None:
    work = tmp_path / "work"
    work.mkdir()
    settings = {"users": 300, "rows": 900, "cohort": 5, "rounds": 1, "workers": 0}
    result = PopulationBenchmark(model=str(model), folder=work, **settings).run()
    printed = capfd.readouterr().out
    line = json.loads(printed.splitlines()[-1])
    assert line == json.loads(json.dumps(result))
    passes, training = line["ingest"]["passes"], line["training"]
    assert list(passes)[1:] == [
        "Reading and encoding",
        "Sorting by user",
        "Grouping by user",
        "Comparing users",
        "Writing the store",
    ]
    assert all(one["peak_mib"] > 0 for one in passes.values())
    times = Times.from_json(training["phases"])
    assert times.rounds == 1
    assert {"load", "compute", "transport", "noise", "optimizer", "sampling", "charge", "other"} <= set(times.seconds)
    assert times.whole <= training["rounds_seconds"] * 1.01
    assert 0 < training["epsilon"] <= 2
    assert all(phase in printed for phase in (*passes, *times.seconds))
    assert list(work.iterdir()) == []
