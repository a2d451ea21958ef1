"""`sweep` from Python: a grid of settings at fixed compute."""

from pathlib import Path
from typing import Any

from experiments.face.arguments import spelt_for_python
from experiments.face.fine_tune import configuration
from experiments.face.outcomes import Swept
from experiments.sweep.command import Sweep


def sweep(
    model: Any = "default",
    rows: Any = None,
    *,
    tokenizer: Any = None,
    objective: Any = None,
    output: str | Path | None = None,
    **options: Any,
) -> Swept:
    """Compare ULS and ELS over ε, compute, group sizes, learning rates, clip norms and seeds, a run each.

    A sweep that was interrupted goes on where it stopped when it is called again with the same `output`.

    Args:
        model, rows, tokenizer, objective, output: As for `fedsim.fine_tune`.
        options: As for `fine_tune`, and the grid: `epsilons=[2, 8]`, `compute=[64, 256]`, `uls_group_sizes=[1, 4]`,
            `els_group_sizes=[4, 16]`, `learning_rates=[1e-3, 3e-3]`, `seeds=3`.

    Returns:
        The finished sweep: `.points`, a record each; `.failures`, `.report`, `.folder`.

    Raises:
        InvalidInput: Something that was given is not allowed; nothing is spent.
        Failure: No point finished.
        Stopped: After Ctrl-C, at the end of a round.
    """
    with spelt_for_python(Sweep):
        given = {**options, "output": None if output is None else str(output)}
        config: Sweep = configuration(Sweep, model, rows, tokenizer, objective, None, given)
        return config.swept()
