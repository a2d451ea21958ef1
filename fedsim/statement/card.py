"""The model card: what others read of an exported model first, written from its privacy statement."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.privacy.bounds import shown_above, shown_below

CARD = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
LOADING = {
    ("causal-lm", False): ("transformers", "AutoModelForCausalLM"),
    ("causal-lm", True): ("peft", "AutoPeftModelForCausalLM"),
    ("sequence-classification", False): ("transformers", "AutoModelForSequenceClassification"),
    ("sequence-classification", True): ("peft", "AutoPeftModelForSequenceClassification"),
    ("seq2seq-lm", False): ("transformers", "AutoModelForSeq2SeqLM"),
    ("seq2seq-lm", True): ("peft", "AutoPeftModelForSeq2SeqLM"),
}
"""What reads an export, by task and whether it is adapters: package and class."""
PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "seq2seq-lm": "text2text-generation",
}


def model_card(
    statement: Mapping[str, Any],
    *,
    base: str,
    task: str,
    adapters: bool,
    classes: Sequence[str] = (),
    module: str | None = None,
) -> str:
    """The card of a model, in Markdown with the hub's header.

    It tells nothing of the training data but what the statement treats as public, and no path of this machine.

    Args:
        statement: What privacy.json holds.
        base: The model that training began with, by name or folder ("default" for our own small one).
        task: What the model does, as `ModelConfig.task` has it.
        adapters: Whether the export is LoRA adapters.
        classes: Names of a classifier's classes.
        module: Class of the model, where it is a module of somebody's own.
    """
    package, kind = LOADING[task, adapters] if module is None else ("safetensors", "load_model")
    on_hub = bool(HUB_NAME.fullmatch(base)) and base != "default" and not Path(base).exists()
    lines = ["---", f"library_name: {package}", f"pipeline_tag: {PIPELINES[task]}"]
    if on_hub:
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- differential-privacy", "- user-level-differential-privacy", "- fedsim", "---", ""]
    lines += [
        "# A model fine-tuned with user-level differential privacy" if statement["private"] else NO_GUARANTEE,
        "",
    ]
    lines += [
        _guarantee(statement),
        "",
        "## In full",
        "",
        str(statement["in_words"]),
        "",
        "## What is not covered",
        "",
    ]
    lines += [f"- {sentence}" for sentence in statement["not_covered"]]
    lines += ["", "## Where it comes from", "", f"- Base model: {_base_in_words(base, on_hub)}."]
    if earlier := statement.get("earlier", {}).get("runs"):
        people = statement["earlier"]["people"]
        lines.append(f"- Training went on from earlier runs on {people} people's data: {', '.join(earlier)}.")
    sizes = "; ".join(f"{name}: {count}" for name, count in statement.get("public_sizes", {}).items())
    lines.append(
        f"- Training data: text of users. Nothing else is told of it than what is public ({sizes or 'nothing'})."
    )
    if classes:
        lines.append(f"- Classes: {', '.join(classes)}.")
    lines += ["", "## How to load it", "", "```python", *_loading(package, kind, module), "```", ""]
    if statement["recompute"]:
        lines += ["ε is recomputed from `ledger.jsonl`, which lies beside the model, by", "", "```"]
        lines += [str(statement["recompute"]), "```", ""]
    return "\n".join(lines)


NO_GUARANTEE = "# A fine-tuned model WITHOUT any privacy guarantee: not to be released"


def write_card(statement: Path, card: Path, **described: Any) -> Path:
    """Write the card that belongs to a statement's file; `described` as for model_card. Returns the card's path."""
    values = json.loads(statement.read_text(encoding="utf-8"))
    card.write_text(model_card(values, **described), encoding="utf-8")
    return card


def _guarantee(statement: Mapping[str, Any]) -> str:
    if not statement["private"]:
        return "It gives no guarantee: whoever holds it may be able to recover what single users wrote."
    epsilon = statement["epsilon"]
    rows = {
        "Protected unit": f"one {statement['unit']} with all of their text",
        "ε": f"{shown_above(epsilon['upper'])}, a certified upper bound (at least {shown_below(epsilon['lower'])})",
        "δ": f"{statement['delta']:g}",
        "Neighbouring data": statement["adjacency"],
        "Algorithm": f"{str(statement['algorithm']).upper()}, {statement['steps']} steps",
        "Sampling": statement["sampling"]["in_words"],
        "One user's contribution": statement["contribution_bound"]["in_words"],
        "Noise": f"{statement['mechanism']} (noise multiplier {statement['noise_multiplier']:g})",
    }
    if (private := statement.get("private_evaluation")) is not None:
        trained, held_out = (shown_above(private["epsilon"][split]["upper"]) for split in ("training", "held-out"))
        rows["ε by split"] = f"{trained} for users whose text trained the model, {held_out} for held-out users"
        rows["Evaluations"] = private["in_words"]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _loading(package: str, kind: str, module: str | None) -> list[str]:
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    if module is None:
        imports = [f"from {package} import {kind}", "from transformers import AutoTokenizer"]
        return [*imports, "", f'model = {kind}.from_pretrained("FOLDER")', tokenizer]
    imports = ["from safetensors.torch import load_model", "from transformers import AutoTokenizer"]
    made = f"model = {module}(…)  # made as it was for training"
    return [*imports, "", made, 'load_model(model, "FOLDER/model.safetensors")', tokenizer]


def _base_in_words(base: str, on_hub: bool) -> str:
    if base == "default":
        return "fedsim's small GPT-2, pre-trained on public text"
    return f"`{base}`" if on_hub else f"`{Path(base).name}`, from a folder"
