"""The scripts and notebooks of examples/, run as their readers would."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
WORDS = "[END] A short note about : . it is has was the budget new office release garden party train to work lunch"
WORDS += " going well needs more time moved Friday all we talk over at last"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model, so that the scripts take seconds."""
    torch.manual_seed(0)
    words = WORDS.split()
    library = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[END]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="[END]", pad_token="[END]")
    tokenizer.save_pretrained(tmp_path / "tiny")
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    shape = GPT2Config(vocab_size=len(words), **sizes)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(script: str, *arguments: str, folder: Path) -> str:
    """What a script prints, from a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_text(model: Path, tmp_path: Path) -> None:
    posts = tmp_path / "posts.jsonl"
    rows = runpy.run_path(str(EXAMPLES / "own_text.py"))["made_up"]()
    posts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    printed = run("own_text.py", str(posts), str(model), folder=tmp_path)
    assert "round 8: held-out loss" in printed
    assert "ε ≤ 8" in printed
    (report,) = tmp_path.glob("runs/*/report.html")
    assert str(report.relative_to(tmp_path)) in printed


def test_own_model(tmp_path: Path) -> None:
    printed = run("own_model.py", folder=tmp_path)
    assert "a Recurrent with ε = " in printed


def test_own_mechanism(model: Path, tmp_path: Path) -> None:
    printed = run("own_mechanism.py", str(model), folder=tmp_path)
    assert "uls-gaussian: test loss" in printed
    assert "uls-own_mechanism-share-of-embeddings: test loss" in printed


def test_sweep(model: Path, tmp_path: Path) -> None:
    printed = run("sweep.py", "swept", str(model), folder=tmp_path)
    assert "nonprivate" in printed
    assert (tmp_path / "swept" / "report.html").is_file()


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_scripts_are_short(script: str) -> None:
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("name", ["accounting", "uls_against_els"])
def test_notebooks_run_in_a_kernel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(EXAMPLES)]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "its figure is not shown"
    assert not any(output.output_type == "error" for output in outputs)
