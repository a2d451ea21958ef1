"""`generate`: text from a model."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from fedsim.errors import InvalidInput
from fedsim.models.decoding import Decoding, Messages


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a language model go on with prompts. The text follows from the released weights: it costs no privacy."""

    folder: Positional[str]
    """The folder of a finished run, a model or LoRA adapters in Hugging Face format, or a name on the hub."""
    prompt: tuple[str, ...] = ()
    """Texts to go on with, each in quotes."""
    prompt_file: Path | None = None
    """A file of prompts: one a line; in a .jsonl file one JSON value a line, a text or, with --chat, a conversation
    (a list of {"role", "content"})."""
    chat: bool = False
    """The prompts are what a user says: written out by the tokenizer's chat template, for the assistant to answer."""
    max_new_tokens: int = 64
    """Most tokens after the prompt."""
    temperature: float = 1.0
    """Logits are divided by it: lower chooses likelier tokens, 0 the likeliest each time."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that have this probability together."""
    top_k: int = 0
    """Choose among so many of the likeliest tokens; 0 for all."""
    number: int = 1
    """Continuations of each prompt."""
    seed: int | None = None
    """Seed of the choices, for text that repeats; by default other text each time."""
    device: str | None = None
    """Where to compute (cpu, cuda, cuda:1); by default a GPU if there is one."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Load, generate, print."""
        names = [item.name for item in dataclasses.fields(Decoding)]
        decoding = Decoding(**{name: getattr(self, name) for name in names})
        prompts = self._prompts()

        from experiments.loading import loaded_for_use
        from fedsim.models.generate import continued

        loaded = loaded_for_use(self.folder, self.device)
        if loaded.config.task != "causal-lm":
            classifier = loaded.config.task == "sequence-classification"
            kind = "a classifier" if classifier else "one of encoder and decoder"
            pipeline = "classification" if classifier else "2text-generation"
            hint = f"Measure it with evaluate, or use transformers' text{'-' * classifier}{pipeline} pipeline."
            raise InvalidInput("folder", self.folder, f"a causal language model, and this is {kind}", hint)
        answers = []
        for place, prompt in enumerate(prompts):
            texts = continued(loaded, prompt, decoding, place)
            answers.append({"prompt": prompt, "continuations": texts})
            if not self.json:
                _print(prompt, texts, several=len(prompts) * len(texts) > 1)
        if self.json:
            print(json.dumps({"model": self.folder, "seed": self.seed, "answers": answers}, ensure_ascii=False))
        return 0

    def _prompts(self) -> list[str | Messages]:
        """All prompts, those of the options first.

        Raises:
            InvalidInput: There is none, or the file cannot be read as prompts.
        """
        found: list[Any] = list(self.prompt)
        if self.prompt_file is not None:
            found += _read(self.prompt_file, self.chat)
        if not found:
            raise InvalidInput("prompt", None, "given", 'Add --prompt "…" or --prompt-file FILE.')
        return [[{"role": "user", "content": one}] if self.chat and isinstance(one, str) else one for one in found]


def _read(path: Path, chat: bool) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInput("prompt-file", str(path), "a text file in UTF-8", f"Reading it said: {error}.") from None
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not (isinstance(value, str) or (chat and _is_conversation(value))):
            allowed = "a JSON text" + (' or a list of {"role", "content"}' if chat else "")
            raise InvalidInput("prompt-file", f"{path}, line {number}", allowed)
        values.append(value)
    return values


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def _print(prompt: str | Messages, texts: list[str], *, several: bool) -> None:
    for place, text in enumerate(texts, start=1):
        if several:
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            print(f"--- {shown!r}" + (f", {place} of {len(texts)}" if len(texts) > 1 else ""))
        print(prompt + text if isinstance(prompt, str) else text)
