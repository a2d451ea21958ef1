"""`generate`: text from runs, models and adapters, offline."""

import json
from pathlib import Path

import pytest
from trained_models import data_flags, posts, story_llama, train

from experiments.run import main


def answers(capsys: pytest.CaptureFixture, *arguments: str) -> list[dict]:
    assert main(["generate", *arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "x", *data_flags(posts(folder / "posts.jsonl")))


def test_a_story_goes_on(capsys) -> None:
    found = answers(capsys, story_llama(), "--prompt", "Once upon a time", "--temperature", "0")
    (text,) = found[0]["continuations"]
    # The likeliest story of this model is known: it was trained on stories that all begin alike.
    assert text.startswith(", there was a little girl named")
    assert len(text.split()) > 20


def test_the_same_seed_tells_the_same_whatever_else_is_asked(capsys) -> None:
    llama = story_llama()
    options = ("--seed", "3", "--number", "2", "--max-new-tokens", "12")
    first = answers(capsys, llama, "--prompt", "Once upon", *options)
    again = answers(capsys, llama, "--prompt", "Once upon", "The dog", *options)
    assert again[0] == first[0]
    assert len(set(first[0]["continuations"])) == 2
    other = answers(capsys, llama, "--prompt", "Once upon", "--seed", "4", *options[2:])
    assert other != first
    unseeded = [answers(capsys, llama, "--prompt", "Once upon", *options[2:]) for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_fewer_choices_leave_the_likeliest(capsys) -> None:
    llama, prompt = story_llama(), ("--prompt", "Once upon a time", "--max-new-tokens", "12")
    likeliest = answers(capsys, llama, *prompt, "--temperature", "0")
    assert answers(capsys, llama, *prompt, "--top-k", "1") == likeliest
    assert answers(capsys, llama, *prompt, "--top-p", "1e-9") == likeliest
    assert answers(capsys, llama, *prompt, "--temperature", "1e-4") == likeliest


@pytest.mark.parametrize("part", [".", "model"])
def test_runs_and_their_models_generate(run: Path, part: str, capsys, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Post 1 of writer\n\nthe fox\n", encoding="utf-8")
    assert main(["generate", str(run / part), "--prompt-file", str(prompts), "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "--- 'Post 1 of writer'" in printed
    assert "--- 'the fox'" in printed


def test_a_text_is_cut_where_the_model_reads_no_further(run: Path, capsys, caplog) -> None:
    (found,) = answers(capsys, str(run), "--prompt", "the fox", "--max-new-tokens", "500", "--seed", "1")
    assert "fit the model's context" in caplog.text
    assert found["continuations"]


def test_conversations_are_written_by_the_chat_template(tmp_path: Path, capsys) -> None:
    import shutil

    llama = shutil.copytree(story_llama(), tmp_path / "chat")
    (llama / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked = [
        {"role": "user", "content": "Tell me"},
        {"role": "assistant", "content": "of"},
        {"role": "user", "content": "dogs"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps("Tell me") + "\n" + json.dumps(asked) + "\n")
    options = ("--temperature", "0", "--max-new-tokens", "8")
    one, two = answers(capsys, str(llama), "--chat", "--prompt-file", str(file), *options)
    plain = answers(capsys, str(llama), "--prompt", "user: Tell me\nassistant: ", *options)
    assert one["prompt"] == [{"role": "user", "content": "Tell me"}]
    assert one["continuations"] == plain[0]["continuations"]
    assert two["prompt"] == asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt-file"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-p", "0"], "top-p"),
        (["--prompt", "a", "--number", "0"], "number"),
        (["--prompt", "a", "--number", "2", "--temperature", "0"], "number"),
        (["--prompt", "a", "--chat"], "chat template"),
        (["--prompt", "word " * 40], "tokens that the model can read"),
        (["--prompt", "a", "--device", "teapot"], "device"),
        (["--prompt-file", "/absent"], "prompt-file"),
    ],
)
def test_bad_input_is_a_sentence(run: Path, arguments: list[str], words: str, capsys) -> None:
    assert main(["generate", str(run), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_model_and_no_language_model_are_refused(tmp_path: Path, capsys) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert main(["generate", "/absent", "--prompt", "a"]) == 2
    labelled = (*data_flags(posts(tmp_path / "posts.jsonl")), "--data.label-column", "mood")
    classifier = train(tmp_path / "x", *labelled, "--model.task", "sequence-classification", "--model.num-labels", "3")
    capsys.readouterr()
    assert main(["generate", str(classifier), "--prompt", "a"]) == 2
    assert "classifier" in capsys.readouterr().err


def test_adapters_generate_on_their_base(tmp_path: Path, capsys) -> None:
    data = data_flags(posts(tmp_path / "posts.jsonl"))
    run = train(tmp_path / "x", *data, "--model.path", story_llama(), "--model.lora-rank", "2")
    options = ("--prompt", "Once upon a time", "--temperature", "0", "--max-new-tokens", "8")
    adapted = answers(capsys, str(run), *options)
    assert adapted == answers(capsys, str(run / "model"), *options)
    plain = answers(capsys, story_llama(), *options)
    assert adapted[0]["prompt"] == plain[0]["prompt"]
