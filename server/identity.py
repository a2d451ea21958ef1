"""What makes a resumed run the same run: its settings, plan, data, tokenizer and model."""

import hashlib
import json
from typing import Any

import torch

from fedsim.config import RunConfig, from_flat, to_flat
from fedsim.errors import InvalidInput
from fedsim.plan import Plan
from fedsim.resources import Resources

MAY_CHANGE = ("data.", "model.", "engine.", "evaluation.", "checkpoint.", "output", "resume")
"""Settings that may differ: where and how fast it runs, what is measured. Data and model are compared by content."""
YET_FIXED = ("engine.exact",)


def identity_of(config: RunConfig, plan: Plan, resources: Resources) -> dict[str, Any]:
    """Everything that must be the same when a run goes on, as JSON values."""
    return {
        "settings": settings_of(config),
        "plan": json.loads(plan.to_json()),
        "data": resources.store.fingerprint,
        "tokenizer": tokenizer_fingerprint(resources.loaded.tokenizer),
        "model": model_fingerprint(resources.loaded.model),
    }


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that must not change, as JSON values."""
    return {
        name: _plain(value)
        for name, value in sorted(to_flat(config).items())
        if not name.startswith(MAY_CHANGE) or name in YET_FIXED
    }


def require_same(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on with another plan, data, tokenizer or model.

    Raises:
        InvalidInput: Names everything that differs.
    """
    before, now = _leaves(stored), _leaves(current)
    differing = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if differing:
        what = "; ".join(f"{_shown(name)}: {before.get(name)!r} then, {now.get(name)!r} now" for name in differing)
        raise InvalidInput(
            "resume",
            ", ".join(map(_shown, differing)),
            "as in the run that goes on",
            f"What differs is {what}. Resume with the same, or start a new run.",
        )


def stored_config(kind: type, written: Any, folder: str) -> Any:
    """The configuration in a run's config.json.

    Raises:
        InvalidInput: When it is not what was written there.
    """
    flat = written.get("config") if isinstance(written, dict) else None
    if not isinstance(flat, dict):
        raise InvalidInput("resume", folder, "a folder with a run's config.json")
    return from_flat(kind, flat)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary and, for tokenizers of the tokenizers library, of everything else too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hash of every parameter and buffer, frozen ones included: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _shown(name: str) -> str:
    return name.removeprefix("settings.")


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        leaf: item for key, part in value.items() for leaf, item in _leaves(part, f"{name}.{key}".strip(".")).items()
    }


def _plain(value: Any) -> Any:
    """Infinity is not JSON."""
    return repr(value) if value in (float("inf"), float("-inf")) else value
