"""What is wrong is said in a sentence, with exit code 2, and leaves nothing behind."""

import json
from pathlib import Path

import pytest

from experiments.run import main

RUNS = Path(__file__).parent / "runs_of_version_0_1"
FILES = ["--data.source", "files", "--data.user-column", "author", "--data.text-column", "text"]
ULS = ["--algorithm", "uls", "--sampling-probability", "0.01", "--noise-multiplier", "1", "--steps", "10"]
TINY = ["--model.small.layers", "1", "--model.small.width", "16", "--model.small.heads", "2",
        "--model.small.vocabulary-size", "300", "--model.small.steps", "0", "--data.sequence-length", "16",
        "--engine.kind", "local", "--engine.workers", "1"]  # fmt: skip


def data(name: str, *more: str) -> list[str]:
    """Train on a file of the folder."""
    return ["train", *FILES, *TINY, "--data.path", name, *more]


def good(*more: str) -> list[str]:
    """Train on data that are as they should be."""
    return data("posts.jsonl", "--plan.delta", "1e-3", "--plan.gradients-per-round", "16", *more)


CASES: list[tuple[list[str], str]] = [
    # Values out of range.
    (["train", "--plan.epsilon", "0"], "plan.epsilon is 0.0"),
    (["train", "--plan.epsilon", "-1"], "plan.epsilon is -1.0"),
    (["train", "--plan.epsilon", "nan"], "plan.epsilon is nan"),
    (["train", "--plan.epsilon", "inf"], "plan.epsilon is inf"),
    (["train", "--plan.delta", "0"], "plan.delta is 0.0"),
    (["train", "--plan.delta", "1"], "plan.delta is 1.0"),
    (["train", "--plan.delta", "nan"], "plan.delta is nan"),
    (["train", "--plan.group-size", "0"], "plan.group-size is 0"),
    (["train", "--plan.group-size", "-3"], "plan.group-size is -3"),
    (["train", "--plan.rounds", "0"], "plan.rounds is 0"),
    (["train", "--plan.gradients-per-round", "0"], "plan.gradients-per-round is 0"),
    (["train", "--plan.clip-norm", "0"], "plan.clip-norm is 0.0"),
    (["train", "--plan.clip-norm", "inf"], "plan.clip-norm is inf"),
    (["train", "--plan.noise-multiplier", "nan"], "plan.noise-multiplier is nan"),
    (["train", "--plan.noise-multiplier", "-1"], "plan.noise-multiplier is -1.0"),
    (["train", "--plan.noise-multiplier", "0"], "plan.noise-multiplier is 0"),
    (["train", "--plan.clip-quantile", "1.5"], "plan.clip-quantile is 1.5"),
    (["train", "--plan.bands", "many"], "plan.bands is 'many'"),
    (["train", "--plan.bands", "0"], "plan.bands is '0'"),
    (["train", "--plan.mechanism", "gausian"], "plan.mechanism is 'gausian'"),
    (["train", "--plan.mechanism", ""], "plan.mechanism is ''"),
    (["train", "--plan.mechanism", "nowhere:Noise"], "plan.mechanism is 'nowhere:Noise'"),
    (["train", "--plan.sampling", "poison"], "plan.sampling is 'poison'"),
    (["train", "--optimizer.learning-rate", "0"], "optimizer.learning-rate is 0.0"),
    (["train", "--optimizer.learning-rate", "inf"], "optimizer.learning-rate is inf"),
    (["train", "--optimizer.momentum", "1"], "optimizer.momentum is 1.0"),
    (["train", "--optimizer.average-decay", "0.5"], "optimizer.average-decay is 0.5"),
    (["train", "--engine.workers", "-1"], "engine.workers is -1"),
    (["train", "--engine.timeout-seconds", "nan"], "engine.timeout-seconds is nan"),
    (["train", "--evaluation.every", "0"], "evaluation.every is 0"),
    (["train", "--checkpoint.minutes", "-1"], "checkpoint.minutes is -1.0"),
    (["train", "--checkpoint.minutes", "nan"], "checkpoint.minutes is nan"),
    (["train", "--data.sequence-length", "1"], "data.sequence-length is 1"),
    (["train", "--data.validation-fraction", "0.7", "--data.test-fraction", "0.7"], "data.validation-fraction"),
    (["train", "--data.packages", "no_such_package"], "data.packages is 'no_such_package'"),
    (["train", "--model.lora-rank", "-1"], "model.lora-rank is -1"),
    (["train", "--model.small.heads", "3", "--model.small.width", "64"], "model.small"),
    (["train", "--release", "--noise-seed", "1"], "noise-seed is 1"),
    (["train", "--noise-seed", "-1"], "noise-seed is -1"),
    (["train", "--sampling-seed", "-1"], "sampling-seed is -1"),
    (["compare", "--release"], "release is True"),
    (["compare", "--uls.group-size", "0"], "uls.group-size is 0"),
    (["compare", "--mechanisms", "gausian"], "mechanisms"),
    (["compare", "--l1-clip-norm", "0"], "l1-clip-norm is 0.0"),
    (["compare", "--algorithms"], "algorithms is ()"),
    (["compare", "--algorithms", "uls", "uls"], "algorithms is ('uls', 'uls')"),
    (["sweep", "--sweep.seeds", "0"], "sweep.seeds is 0"),
    (["sweep", "--sweep.epsilons", "0"], "sweep.epsilons"),
    (["sweep", "--sweep.epsilons", "nan"], "sweep.epsilons"),
    (["sweep", "--sweep.clip-norms", "-1"], "sweep.clip-norms"),
    (["sweep", "--sweep.learning-rates", "0"], "sweep.learning-rates"),
    (["sweep", "--sweep.compute", "0"], "sweep.compute"),
    (["sweep", "--sweep.els-group-sizes", "0"], "sweep.els-group-sizes"),
    (["sweep", "--sweep.bands", "many"], "sweep.bands"),
    (["sweep", "--sweep.algorithms"], "sweep.algorithms is ()"),
    # Commands without training.
    (["account", *ULS, "--delta", "2"], "delta is 2.0"),
    (["account", *ULS, "--delta", "nan"], "delta is nan"),
    (["account", *ULS[:-2], "--steps", "-1", "--delta", "1e-6"], "steps is -1"),
    (["account", "--algorithm", "els", "--group-size", "0"], "group-size is 0"),
    (["account", *ULS, "--delta", "1e-6", "--target-epsilon", "-1"], "target-epsilon is -1.0"),
    (["account", *ULS[:-4], "--steps", "3", "--delta", "1e-6", "--target-epsilon", "nan"], "target-epsilon is nan"),
    (["account", "--algorithm", "uls", "--sampling-probability", "1.5", "--noise-multiplier", "1", "--steps", "9",
      "--delta", "1e-6"], "sampling-probability is 1.5"),
    (["account", *ULS, "--delta", "1e-6", "--cohort-size", "4"], "cohort-size is 4"),
    (["account", *ULS, "--delta", "1e-6", "--plot", "absent/file/curve.txt"], "plot is 'absent/file/curve.txt'"),
    (["account", *ULS, "--delta", "1e-6", "--plot", "posts.jsonl/curve.png"], "plot is 'posts.jsonl/curve.png'"),
    (["account", "--check", "absent"], "check is 'absent'"),
    (["account", "--ledger", "absent"], "ledger is 'absent'"),
    (["plan", "--plan.epsilon", "0"], "plan.epsilon is 0.0"),
    (["plan", "--plan.epsilon", "nan"], "plan.epsilon is nan"),
    (["plan", "--plan.delta", "1"], "plan.delta is 1.0"),
    (["plan", "--plan.rounds", "0"], "plan.rounds is 0"),
    (["plan", "--num-users", "0"], "num-users is 0"),
    (["plan", "--num-users", "100", "--group-sizes", "0"], "group-sizes"),
    (["plan", "--plan.hours", "1"], "plan.tokens-per-second"),
    (["plan", "--num-users", "100", "--output", "posts.jsonl"], "output is 'posts.jsonl'"),
    (["audit", "--trials", "0"], "trials is 0"),
    (["audit", "--confidence", "1"], "confidence is 1.0"),
    (["audit", "--run-folder", "absent"], "run-folder is 'absent'"),
    (["audit", "--output", "posts.jsonl/found.json"], "output is 'posts.jsonl/found.json'"),
    (["generate", "absent", "--prompt", "x"], "folder is 'absent'"),
    (["generate", "absent"], "prompt is None"),
    (["generate", "absent", "--prompt-file", "absent.txt"], "prompt-file is 'absent.txt'"),
    (["generate", "absent", "--prompt-file", "binary.jsonl"], "prompt-file is 'binary.jsonl"),
    (["generate", "absent", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
    (["evaluate", "absent"], "folder is 'absent'"),
    (["push", "absent", "owner/name"], "folder is 'absent'"),
    (["push", ".", "owner/name"], "folder is '.'"),
    (["prepare", *FILES, "--data.path", "absent.jsonl"], "data.path is 'absent.jsonl'"),
    (["prepare", *FILES, "--data.path", "posts.jsonl", "--output", "empty.jsonl"], "output is 'empty.jsonl'"),
    (["prepare", *FILES, "--data.path", "posts.jsonl", "--output", "notes"], "output is 'notes'"),
    (["merge", "absent", "--output", "merged"], "path is 'absent'"),
    (["merge", "absent", "--output", "posts.jsonl"], "output is 'posts.jsonl'"),
    (["report", "absent"], "folder is 'absent'"),
    (["report", "notes"], "folder is 'notes'"),
    (["report", "posts.jsonl"], "folder is 'posts.jsonl'"),
    (["mean-estimation", "--repetitions", "1"], "repetitions is 1"),
    (["mean-estimation", "--epsilons", "0"], "epsilons"),
    (["mean-estimation", "--group-sizes", "0"], "group-sizes"),
    (["mean-estimation", "--output", "posts.jsonl"], "output is 'posts.jsonl'"),
    (["search-noise", "--epsilon", "0"], "epsilon is 0.0"),
    (["search-noise", "--delta", "1"], "delta is 1.0"),
    (["search-noise", "--generations", "-1"], "generations is -1"),
    (["search-noise", "--generations", "0", "--output", "posts.jsonl/noise.json"],
     "output is 'posts.jsonl/noise.json'"),
    # Names and files.
    (["trian"], "command is 'trian'"),
    ([""], "command is ''"),
    (["train", "--preset", "shakespear"], "preset is 'shakespear'"),
    (["train", "--preset", "absent.toml"], "preset is 'absent.toml'"),
    (["train", "--preset", "broken.toml"], "preset is 'broken.toml'"),
    (["train", "--preset", "unknown.toml"], "plan.epsilonn"),
    (["train", "--preset", "typed.toml"], "plan.rounds"),
    (["train", "--preset"], "preset"),
    (data("absent.jsonl"), "data.path is 'absent.jsonl'"),
    (data(""), "data.path is ''"),
    (data("empty.jsonl"), "data.path is 'empty.jsonl'"),
    (data("broken.jsonl"), "data.path"),
    (data("binary.jsonl"), "data.path"),
    (data("array.json"), "data.path"),
    (data("notes/notes.txt"), "data.path is 'notes/notes.txt'"),
    (data("notes"), "data.path is 'notes'"),
    (data("columns.csv"), "data.user-column is 'author'"),
    (data("twice.csv"), "data.text-column"),
    (data("twice.parquet"), "data.text-column"),
    (data("broken.parquet"), "data.path is 'broken.parquet'"),
    (data("saved"), "data.path is 'saved'"),
    (data("straße/äö.jsonl"), "data.path is 'straße/äö.jsonl'"),
    (data("posts.jsonl", "--data.user-column", ""), "data.user-column"),
    (data("posts.jsonl", "--data.text-column", "author"), "data.user-column"),
    (data("posts.jsonl", "--data.minimum-tokens", "99999"), "data"),
    (["train", "--data.source", "store", "--data.path", "absent"], "data.path is 'absent'"),
    (["train", "--data.source", "store", "--data.path", "notes"], "data.path is 'notes'"),
    (["train", "--data.source", "store"], "data.path is None"),
    (["train", "--data.source", "files"], "data.path is None"),
    (["train", "--data.source", "hub", "--data.path", "no-such/data-set", "--data.user-column", "a",
      "--data.text-column", "b", *TINY], "data.path is 'no-such/data-set'"),
    (["train", "--model.path", "no-such/model"], "model.path is 'no-such/model'"),
    (["train", "--model.path", ""], "model.path is ''"),
    (["train", "--model.path", "notes"], "model.path is 'notes'"),
    (["train", "--model.path", "posts.jsonl"], "model.path is 'posts.jsonl'"),
    (good("--output", "posts.jsonl"), "output is 'posts.jsonl'"),
    (good("--output", "posts.jsonl/run"), "output is 'posts.jsonl/run'"),
    (good("--output", "/proc/run"), "output is '/proc/run'"),
    (good("--output", ""), "output is ''"),
    (good("--output", "begun"), "output is 'begun'"),
    (["compare", "--output", "begun"], "output is 'begun'"),
    (["train", "--resume", "absent"], "resume is 'absent'"),
    (["train", "--resume", ""], "resume is ''"),
    (["train", "--resume"], "resume is ''"),
    (["train", "--resume", "notes"], "resume is 'notes'"),
    (["train", "--resume", "posts.jsonl"], "resume is 'posts.jsonl'"),
    (["train", "--resume", "begun"], "resume is 'begun'"),
    (["sweep", "--resume", "notes"], "resume is 'notes'"),
    (["account", "--resume", "notes"], "resume is 'notes'"),
    (good("--plan.gradients-per-round", "99999"), "plan"),
    (good("--model.task", "sequence-classification"), "data.label-column"),
]  # fmt: skip

PARSED = [
    (["train", "--plan.epsilonn", "3"], "--plan.epsilonn"),
    (["train", "--plan.rounds", "many"], "--plan.rounds"),
    (["train", "--plan.rounds", "1.5"], "--plan.rounds"),
    (["train", "--plan.algorithm", "fedavg"], "--plan.algorithm"),
    (["train", "--plan.rounds"], "--plan.rounds"),
    (["train", "stray"], "stray"),
    (["train", "--delta", "1e-6"], "--delta"),
    (["train", "--steps", "3"], "--steps"),
    (["account", "--plan.epsilon", "3"], "--plan.epsilon"),
    (["compare", "--algorithms", "fedavg"], "--algorithms"),
    (["merge"], "path"),
    (["push", "folder"], "repo"),
    (["report"], "folder"),
    (["train", "--plan.ε", "3"], "--plan.ε"),
    (["prepare", "--data.source", "web"], "--data.source"),
]
"""What the parser of options refuses, in words of its own (test_refusals_of_arguments)."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files that are wrong in some way, and posts.jsonl, which is not."""
    import pyarrow as pa
    from pyarrow import parquet

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    lines = [{"author": f"user {n % 40}", "text": f"This is text number {n} of the users."} for n in range(160)]
    (here / "posts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (here / "empty.jsonl").write_text("")
    (here / "broken.jsonl").write_text('{"author": "a", "text"\nnot JSON\n')
    (here / "binary.jsonl").write_bytes(bytes(range(256)) * 8)
    (here / "array.json").write_text(json.dumps(lines)[:-1])
    (here / "columns.csv").write_text("writer,body\na,b\n")
    (here / "twice.csv").write_text("author,text,text\na,one,two\nb,three,four\n")
    (here / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    column = pa.array(["one", "two"])
    table = pa.Table.from_arrays([column, column, column], names=["author", "text", "text"])
    parquet.write_table(table, here / "twice.parquet")
    (here / "notes").mkdir()
    (here / "notes/notes.txt").write_text("Notes.")
    (here / "saved").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (here / "saved" / name).write_text("{}")
    (here / "saved/data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (here / "begun").mkdir()
    (here / "begun/config.json").write_text("{}")
    (here / "broken.toml").write_text("[plan\nepsilon = 1")
    (here / "unknown.toml").write_text("[plan]\nepsilonn = 1.0\n")
    (here / "typed.toml").write_text('[plan]\nrounds = "many"\n')
    return here


def everything(folder: Path) -> dict[str, bytes | None]:
    """All files and folders, with what is in them."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a command that is refused says on standard error."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code == 2, (code, said.out + said.err)
    assert "Traceback" not in said.err
    return said.err


def in_a_sentence(said: str, words: str) -> None:
    """One line, after what was told of the work so far, that begins with the option."""
    *others, last = said.splitlines()
    assert last.startswith(f"error: {words}"), said
    assert not any(line.startswith(("error", "Traceback")) for line in others), said


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_what_is_wrong_is_said_in_a_sentence(
    arguments: list[str], words: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    before = everything(place.parent)
    said = refusal(arguments, capsys)
    in_a_sentence(said, words)
    assert everything(place.parent) == before


@pytest.mark.parametrize(("arguments", "words"), PARSED, ids=[" ".join(arguments) for arguments, _ in PARSED])
def test_what_is_no_option_is_said_in_a_sentence(
    arguments: list[str], words: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    before = everything(place.parent)
    said = refusal(arguments, capsys)
    assert said.startswith("error: "), said
    assert words in said, said
    assert said.count("\n") == 1, said
    assert everything(place.parent) == before
