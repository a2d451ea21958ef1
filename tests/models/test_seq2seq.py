"""Models of encoder and decoder: a text is learnt from its prompt, row by row, clipped, exported and trained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import VOCABULARY, saved
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from experiments.run import main
from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import SequenceToSequence, clipped_sum, clipped_units, random_rows
from fedsim.models.config import ModelConfig
from fedsim.models.described import described_model
from fedsim.models.evaluate import evaluate_rows
from fedsim.models.export import export, probe_rows
from fedsim.models.load import LoadedModel, load_model
from fedsim.rows import IGNORED_LABEL, TokenRows

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": BART,
    "mbart": BART,
    "marian": BART,
    "pegasus": BART,
    "m2m_100": BART,
}


def tiny(family: str, **fields):
    """A tiny random model; weights are four times as large as drawn, so that every layer has a say."""
    config = AutoConfig.for_model(family, **SPECIAL | {"decoder_start_token_id": 0} | FAMILIES[family] | fields)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def loaded_of(family: str, folder: Path, **fields) -> LoadedModel:
    return load_model(ModelConfig(path=saved(tiny(family), folder), task="seq2seq-lm", **fields))


def rows_of(pairs: list[tuple[list[int], list[int]]]) -> TokenRows:
    """Rows of prompts and texts."""
    rows = TokenRows.from_lists([prompt + text for prompt, text in pairs])
    labels = [token for prompt, text in pairs for token in [IGNORED_LABEL] * len(prompt) + text]
    return dataclasses.replace(rows, labels=np.array(labels))


def random_pairs(sizes: list[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(3, VOCABULARY, size).tolist() for size in pair) for pair in sizes]


USERS = np.array([0, 0, 0, 1, 2, 2])
PAIRS = random_pairs([(9, 3), (2, 8), (1, 1), (14, 2), (2, 2), (3, 11)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_loss_is_the_models_own_on_that_row_alone(family) -> None:
    """Whatever its length and its neighbours': the mean over its text's tokens, as transformers computes it."""
    model = tiny(family).requires_grad_(False)
    if family in ("t5", "mt5"):
        for parameter in model.parameters():
            parameter.div_(8)  # so that attention is not sharp, and padding would be seen
    objective = SequenceToSequence(start=0)
    found = evaluate_rows(model, rows_of(PAIRS), objective, max_tokens=1000)
    assert found.label_count.tolist() == [len(text) for _, text in PAIRS]
    start = torch.tensor([[0]])
    for place, (prompt, text) in enumerate(PAIRS):
        label = torch.tensor([text])
        own = model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.cat([start, label[:, :-1]], 1), labels=label
        )
        assert found.losses[place] == pytest.approx(float(own.loss), rel=1e-5)
    if family in ("t5", "mt5", "bart"):  # transformers' own way from labels to what the decoder reads
        own = model(input_ids=torch.tensor([PAIRS[0][0]]), labels=torch.tensor([PAIRS[0][1]]))
        assert found.losses[0] == pytest.approx(float(own.loss), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sums_are_those_of_one_unit_after_the_other(family, rank, tmp_path) -> None:
    """And without a user they lack exactly what it added."""
    loaded = loaded_of(family, tmp_path, lora_rank=rank)
    torch.manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.5)
    loaded.model.double()
    rows = rows_of(PAIRS)
    units = list(clipped_units(loaded.model, rows, USERS, Clip(norm=1e6), objective=loaded.objective))
    norms = torch.tensor([norm for _, _, norm, _ in units])
    assert norms.min() > 0
    clip = Clip(norm=float(norms.min()) / 2)
    each = [update for _, update, _, _ in clipped_units(loaded.model, rows, USERS, clip, objective=loaded.objective)]
    for options in ({}, {"max_tokens": 20}, {"method": "reference"}):
        whole = clipped_sum(loaded.model, rows, USERS, clip, objective=loaded.objective, **options)
        assert float((whole.total - sum(each)).norm()) <= 1e-5 * clip.norm
        torch.testing.assert_close(whole.norms.float(), norms.float(), rtol=1e-5, atol=0)
    left = np.flatnonzero(USERS != 1)
    without = clipped_sum(loaded.model, rows.take(left), USERS[left], clip, objective=loaded.objective)
    assert float((whole.total - without.total - each[1]).norm()) <= 1e-5 * clip.norm


@pytest.mark.parametrize(("family", "rank"), [("m2m_100", 0), ("t5", 2), ("bart", 2)])
def test_the_fast_path_takes_what_it_is_right_for(family, rank, caplog, tmp_path) -> None:
    loaded = loaded_of(family, tmp_path, lora_rank=rank)
    clipped_sum(loaded.model, rows_of(PAIRS), USERS, Clip(norm=1.0), objective=loaded.objective)
    assert "reference path" not in caplog.text


def test_a_row_without_a_prompt_scores_nothing_and_moves_nothing() -> None:
    model, objective = tiny("t5"), SequenceToSequence(start=0)
    pairs = [([], [5, 6, 7]), ([8, 9], []), ([8, 9], [5])]
    rows = rows_of(pairs)
    assert objective.label_counts(rows).tolist() == [0, 0, 1]
    found = evaluate_rows(model, rows, objective)
    assert found.label_count.tolist() == [0, 0, 1]
    assert found.loss_sum[:2].tolist() == [0, 0]
    alone = evaluate_rows(model, rows_of(pairs[2:]), objective)
    assert found.loss_sum[2] == pytest.approx(alone.loss_sum[0], rel=1e-5)
    with pytest.raises(InvalidInput, match=r"rows\.labels"):
        objective.label_counts(TokenRows.from_lists([[1, 2]]))


def test_what_is_measured_scores_labels() -> None:
    objective = SequenceToSequence(start=0)
    assert objective.label_counts(random_rows(objective, 3, 8, VOCABULARY)).tolist() == [4, 4, 4]


@pytest.mark.parametrize("blind", ["encoder", "decoder"])
def test_a_model_that_reads_padding_or_ahead_is_refused(blind, tmp_path, monkeypatch) -> None:
    path = saved(tiny("t5"), tmp_path)
    kind = type(tiny("t5"))
    forward = kind.forward

    def without_mask(self, input_ids=None, attention_mask=None, **others):
        return forward(self, input_ids=input_ids, **others)

    def looking_ahead(self, input_ids=None, decoder_input_ids=None, **others):
        found = forward(self, input_ids=input_ids, decoder_input_ids=decoder_input_ids, **others)
        found.logits = found.logits + found.logits.mean(1, keepdim=True)
        return found

    monkeypatch.setattr(kind, "forward", without_mask if blind == "encoder" else looking_ahead)
    with pytest.raises(InvalidInput, match=r"model\.path"):
        load_model(ModelConfig(path=path, task="seq2seq-lm"))


def test_what_is_no_such_model_is_refused(tmp_path) -> None:
    path = saved(tiny("t5"), tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "t5" / name).write_text(json.dumps(config | {"decoder_start_token_id": None}))
    with pytest.raises(InvalidInput, match="decoder_start_token_id"):
        load_model(ModelConfig(path=path, task="seq2seq-lm"))
    with pytest.raises(InvalidInput, match=r"model\.task"):
        ModelConfig(task="seq2seq")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_export_computes_what_was_trained(family, rank, tmp_path) -> None:
    loaded = loaded_of(family, tmp_path / "base", lora_rank=rank)
    flat = loaded.layout.flatten(loaded.model)
    loaded.layout.load(loaded.model, flat + 0.05 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)))
    folder = export(loaded, tmp_path / "model")  # which compares the losses
    if not rank:
        read = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        losses = [evaluate_rows(m, probe_rows(loaded), loaded.objective).total.loss for m in (loaded.model, read)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpointed_blocks_and_a_rounded_base_give_the_gradients_of_others(tmp_path) -> None:
    sums = {}
    for name, options in {
        "plain": {},
        "checkpointed": {"checkpointing": True},
        "rounded": {"base_dtype": "bfloat16"},
    }.items():
        loaded = loaded_of("bart", tmp_path / name, lora_rank=2, **options)
        found = clipped_sum(loaded.model, rows_of(PAIRS), USERS, Clip(norm=1.0), objective=loaded.objective)
        assert found.finite.all()
        sums[name] = found.total
    assert float((sums["checkpointed"] - sums["plain"]).norm()) <= 1e-4 * float(sums["plain"].norm())
    assert float((sums["rounded"] - sums["plain"]).norm()) <= 0.2 * float(sums["plain"].norm())


def test_a_run_trains_such_a_model(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    path = saved(tiny("bart"), tmp_path / "model")
    records = [{"user_id": f"u{n % 40}", "ask": f"what is {n}?", "text": f"it is {n}"} for n in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = [
        "train", "--data.source", "files", "--data.path", str(tmp_path / "d.jsonl"), "--data.sequence-length", "32",
        "--model.path", path, "--model.task", "seq2seq-lm", "--engine.kind", "local", "--engine.workers", "1",
        "--plan.rounds", "2", "--plan.gradients-per-round", "16", "--plan.delta", "1e-3", "--plan.epsilon", "100",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(arguments) == 2
    assert "data.prompt-column" in capsys.readouterr().err
    assert main([*arguments, "--data.prompt-column", "ask"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert np.isfinite(summary["test_loss_after"])
    # What it left is read as what it is.
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(summary["test_loss_after"], rel=1e-5)
    assert main(["generate", str(tmp_path / "run"), "--prompt", "what is 1?"]) == 2
    assert "this is one of encoder and decoder" in capsys.readouterr().err
    onward = ["--model.path", str(tmp_path / "run"), "--output", str(tmp_path / "on")]
    onward += ["--data.prompt-column", "ask", "--plan.epsilon", "200"]
    assert main([*arguments, *onward, "--model.task", "causal-lm"]) == 2
    assert "set model.task to seq2seq-lm" in capsys.readouterr().err
    assert not (tmp_path / "on/ledger.jsonl").exists()
    assert main([*arguments, *onward]) == 0


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"lora_rank": 2, "export": "merged"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_read_as_what_it_is(family, options, tmp_path) -> None:
    export(loaded_of(family, tmp_path / "base", **options), tmp_path / "model")
    config = described_model(str(tmp_path / "model"))
    assert config.task == "seq2seq-lm"
    assert load_model(config).adapted == (options == {"lora_rank": 2})
    with pytest.raises(InvalidInput, match="seq2seq"):
        load_model(ModelConfig(path=str(tmp_path / "model")))
