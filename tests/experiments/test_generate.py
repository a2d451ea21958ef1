"""`generate`: text from runs, models and adapters, offline."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from trained_models import data_flags, posts, story_llama, train

from experiments.loading import loaded_for_use
from experiments.run import main
from fedsim.models.decoding import Decoding
from fedsim.models.generate import continued
from fedsim.models.load import LoadedModel


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


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return loaded_for_use(story_llama(), "cpu")


def test_the_same_seed_tells_the_same(llama: LoadedModel) -> None:
    asked = Decoding(seed=3, number=2, max_new_tokens=12)
    first = continued(llama, "Once upon", asked)
    assert continued(llama, "Once upon", asked) == first
    assert len(set(first)) == 2
    others = [dataclasses.replace(asked, seed=4), dataclasses.replace(asked, seed=None)]
    assert all(continued(llama, "Once upon", other) != first for other in others)
    assert continued(llama, "Once upon", asked, place=1) != first  # another prompt of the same command
    assert continued(llama, "Once upon", others[1]) != continued(llama, "Once upon", others[1])


def test_fewer_choices_leave_the_likeliest(llama: LoadedModel) -> None:
    likeliest = continued(llama, "Once upon a time", Decoding(temperature=0, max_new_tokens=12))
    for fewer in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        assert continued(llama, "Once upon a time", Decoding(max_new_tokens=12, **fewer)) == likeliest


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
    llama = shutil.copytree(story_llama(), tmp_path / "chat")
    (llama / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
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
        (["--prompt", "word " * 40], "that the model can read"),
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
