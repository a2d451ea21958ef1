"""`compare` from Python: ULS and ELS side by side."""

from pathlib import Path
from typing import Any

from experiments.compare import Compare
from experiments.face.arguments import spelt_for_python
from experiments.face.fine_tune import configuration
from experiments.face.outcomes import Compared


def compare(
    model: Any = "default",
    rows: Any = None,
    *,
    tokenizer: Any = None,
    objective: Any = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> Compared:
    """Fine-tune by user-level sampling (ULS) and by the example-level baseline (ELS), at the same compute and (ε, δ).

    Args:
        model, rows, tokenizer, objective, output, resume: As for `fedsim.fine_tune`.
        options: As for `fine_tune`; what is tuned for one algorithm by its name and the option's (`els_group_size=8`,
            `uls_learning_rate=3e-3`), and `mechanisms=["gaussian", "adaptive-noise"]` for an arm each.

    Returns:
        The finished comparison: `.arms` by name, `.summaries`, `.prediction`, `.report()`, `.folder`.

    Raises:
        InvalidInput: Something that was given is not allowed; nothing is spent.
        Failure: As for `fine_tune`.
        Stopped: As for `fine_tune`.
    """
    with spelt_for_python(Compare):
        given = {**options, "output": None if output is None else str(output)}
        config: Compare = configuration(Compare, model, rows, tokenizer, objective, resume, given)
        return config.compared(config.own_folder())
