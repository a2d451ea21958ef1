"""Packages that the core does without, and the extra of fedsim that brings each."""

EXTRAS = {
    "sim": (
        "torch", "flwr", "ray", "transformers", "datasets", "peft", "safetensors", "pyarrow", "duckdb", "filelock",
        "tokenizers", "cryptography", "cloudpickle", "huggingface_hub",
    ),
    "quantised": ("bitsandbytes",),
}  # fmt: skip


def what_is_needed(command: str, missing: ModuleNotFoundError) -> str | None:
    """What to install for a command that does not find a module; None for a module that no extra brings."""
    package = (missing.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"{command} needs {package}, which is not installed: pip install 'fedsim[{extra}]'"
    return None
