"""Text of a run's model before and after training, from the same prompts: what the loss alone does not show.

It follows from the released weights, and so costs no privacy; the base model saw nothing of the users.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.report.arms.arm import Arm
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from server.identity import stored_config
from server.results.run_folder import write_json

SAMPLES = "samples.json"
"""The texts, in a run's folder."""
LENGTH = 40
"""Tokens after a prompt."""


def read_samples(folder: Path) -> list[dict[str, str]]:
    """Prompt, text before and after; none where none were made."""
    path = folder / SAMPLES
    return list(json.loads(path.read_text(encoding="utf-8"))["samples"]) if path.exists() else []


def write_samples(arms: Sequence[Arm], prompts: Sequence[str]) -> None:
    """Let the models of finished runs go on with prompts, as the models that they were made from do.

    Args:
        arms: The runs; several of one base load it once.
        prompts: Public text, for it is shown.

    Raises:
        InvalidInput: A run is not finished or its model writes no text, its base or its own model is no longer there,
            or a prompt cannot be read.
    """
    configs = [_configured(arm) for arm in arms]
    before: dict[str, list[str]] = {}
    for arm, config in zip(arms, configs, strict=True):
        base = repr(config.model)
        if base not in before:
            before[base] = _texts(_base(config), prompts)
        after = _texts(_tuned(arm), prompts)
        samples = [
            {"prompt": prompt, "before": old.strip(), "after": new.strip()}
            for prompt, old, new in zip(prompts, before[base], after, strict=True)
        ]
        write_json(arm.run.path / SAMPLES, {"samples": samples})


def _configured(arm: Arm) -> RunConfig:
    config: RunConfig = stored_config(RunConfig, {"config": arm.settings}, str(arm.run.path))
    if arm.unfinished or not arm.run.model.is_dir():
        raise InvalidInput("folder", str(arm.run.path), "a finished run with its model, to let it write samples")
    if config.model.task != "causal-lm":
        hint = "Write the report without --samples."
        raise InvalidInput("samples", True, f"left out: the model's task is {config.model.task}", hint)
    return config


def _base(config: RunConfig) -> Any:
    from fedsim.cache import default_cache
    from fedsim.data.sources import public_texts, silent
    from fedsim.models.load import load_model

    cache = default_cache()
    return load_model(config.model, public_texts=lambda: public_texts(cache, silent), cache=cache)


def _tuned(arm: Arm) -> Any:
    from experiments.loading import loaded_for_use

    return loaded_for_use(str(arm.run.path), "cpu")


def _texts(loaded: Any, prompts: Sequence[str]) -> list[str]:
    """The same seed for both models: they differ by their weights alone."""
    from fedsim.models.decoding import Decoding
    from fedsim.models.generate import continued

    decoding = Decoding(max_new_tokens=LENGTH, temperature=0.8, top_p=0.95, seed=0)
    return [continued(loaded, prompt, decoding, place)[0] for place, prompt in enumerate(prompts)]
