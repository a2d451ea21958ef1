"""What the three papers print of SST-2, as far as it was at hand: abstracts and summaries, read on 2026-11-28."""

from dataclasses import dataclass

NOT_AT_HAND = "not at hand"


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a paper prints.

    Attributes:
        method: Its name.
        paper: Who, when, and where to find it.
        model: What was fine-tuned.
        privacy: The ε and δ that are claimed for the accuracy.
        accuracy: On SST-2.
        worth: What the claimed ε is, and why.
    """

    method: str
    paper: str
    model: str
    privacy: str
    accuracy: str
    worth: str


PRINTED = (
    Printed(
        method="EW-Tune",
        paper="Behnia et al. 2022, arXiv 2210.15042",
        model="RoBERTa",
        privacy=NOT_AT_HAND,
        accuracy=f"{NOT_AT_HAND}; by a summary, over four tasks up to 1.1 % above DP-SGD with up to 5.6 % less noise",
        worth="an estimate of unknown sign",
    ),
    Printed(
        method="LMO-DP",
        paper="Yang et al. 2024, arXiv 2405.18776",
        model="RoBERTa-large",
        privacy="ε = 0.3, δ = 1e-10",
        accuracy="92.20 %",
        worth="not a guarantee: proved for one number, used on vectors clipped in L2",
    ),
    Printed(
        method="ANADP",
        paper="Li et al. 2024, arXiv 2410.02912",
        model="RoBERTa-base",
        privacy=NOT_AT_HAND,
        accuracy=NOT_AT_HAND,
        worth="not a guarantee: average noise is matched, and scales follow raw gradients",
    ),
)
