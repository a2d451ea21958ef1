"""Hashes by which two processes, or two moments, tell whether they hold the same model and tokenizer."""

import hashlib
import json
from typing import Any

import torch

ELSEWHERE = ("_name_or_path", "transformers_version")
"""What a model's configuration says of where and with what it was loaded, which changes nothing it computes."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the vocabulary and, for tokenizers of the tokenizers library, of everything else too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hash of every parameter and buffer, frozen ones included: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def model_fingerprint(model: torch.nn.Module, weights: str) -> str:
    """Hash of what a model computes: its configuration, where it has one, and its weights.

    Two models of equal weights may differ in their activation or in the base of their positions.

    Args:
        model: The model.
        weights: Its `weights_fingerprint`.
    """
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    content = [{name: value for name, value in values.items() if name not in ELSEWHERE}, weights]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
