"""Arguments that are no options: one sentence, with what may have been meant."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.run import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]

SENTENCES = [
    ("train --plan.epsilonn 3", "--plan.epsilonn is no option of this command. Did you mean --plan.epsilon?"),
    ("train --lr 3", "--lr is no option of this command. Did you mean --optimizer.learning-rate?"),
    ("train --optimizer.lr=3", "--optimizer.lr is no option of this command. Did you mean --optimizer.learning-rate?"),
    ("train --plan.eps 3", "--plan.eps is no option of this command. Did you mean --plan.epsilon?"),
    ("compare --epsilon 3", "--epsilon is no option of this command. Did you mean --plan.epsilon?"),
    ("train --seed 3", "--seed is no option of this command. Did you mean --sampling-seed or --noise-seed?"),
    ("train --max-grad-norm 1", "--max-grad-norm is no option of this command. Did you mean --plan.clip-norm?"),
    ("train --xyzzy", "--xyzzy is no option of this command. See --help for those there are."),
    ("train stray", "'stray' belongs to no option; what has blanks in it needs quotes."),
    ("train --plan.rounds x", "--plan.rounds is 'x'; it must be a whole number."),
    ("train --plan.epsilon many", "--plan.epsilon is 'many'; it must be a number."),
    ("train --plan.rounds", "--plan.rounds is without a value; it must be followed by a whole number."),
    ("train --plan.algorithm ulls", "--plan.algorithm is 'ulls'; it must be one of uls, els. Did you mean uls?"),
    ("train --plan.epsilon -1", "plan.epsilon is -1.0; it must be a number above 0."),
    ("generate", "folder is missing; it must be given. See --help."),
    (
        "trian",
        f"command is 'trian'; it must be one of {', '.join(COMMANDS)}. Did you mean train?",
    ),
]


@pytest.mark.parametrize(("line", "sentence"), SENTENCES)
def test_one_sentence(line: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {sentence}\n"
    assert not printed.out


HEAVY = {"torch", "flwr", "ray", "transformers", "matplotlib", "dp_accounting", "pyarrow"}


def loaded_by(arguments: list[str]) -> tuple[int, set[str]]:
    """Exit code of a command in a process of its own, and which of the heavy packages it imported."""
    script = (
        "import sys; from experiments.run import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code or 0\n"
        f"print(code, *({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    code, *heavy = done.stderr.splitlines()[-1].split()
    return int(code), set(heavy)


LIGHT = "account --algorithm uls --sampling-probability 0.01 --noise-multiplier 1 --steps 9 --delta 1e-6"


@pytest.mark.parametrize("line", ["--help", "train --lr 3", "train --plan.epsilon -1", LIGHT])
def test_what_computes_is_not_imported_to_refuse(line: str) -> None:
    code, heavy = loaded_by(line.split())
    assert code in (0, 2)
    assert not heavy


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"evaluate", "prepare"}))
def test_nor_to_help(command: str) -> None:
    assert loaded_by([command, "--help"]) == (0, set())


@pytest.mark.parametrize("command", ["evaluate", "prepare"])
def test_commands_about_data_import_what_reads_it_alone(command: str) -> None:
    assert loaded_by([command, "--help"]) == (0, {"pyarrow"})


def test_help_names_presets_and_what_it_is_called_by(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["help", "train"])
    printed = capsys.readouterr().out
    assert "--preset NAME" in printed
    assert "shakespeare" in printed
    assert "--resume FOLDER" in printed
    assert "usage: python -m experiments.run train" in printed


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fedsim ")
