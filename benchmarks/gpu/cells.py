"""What is measured, in order of worth: each cell's share of the time, and what its figures mean."""

from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.gradient_models import SIZES, Size

Kind = Literal["ceilings", "clips", "steps", "rounds", "slices"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One process of the benchmark.

    Attributes:
        kind: What it does.
        share: Its weight where the time that is left is shared out among the cells to come.
        meaning: What its figures say, for the page.
        model: Name of the model's size.
        checkpointing: Whether activations are computed again in the backward pass.
        engine: Of rounds: "direct" or "ray".
    """

    kind: Kind
    share: float
    meaning: str
    model: str = ""
    checkpointing: bool = False
    engine: str = "direct"


CELLS = {
    "ceilings": Cell(
        kind="ceilings", share=3,
        meaning="What the device does at most: no step can be quicker than its copies and products.",
    ),
    "clips": Cell(
        kind="clips", share=13,
        meaning="Whether the clip holds on this device. Random ragged users of small models: in float32 their clipped "
        "sum is compared with that of the loop over users in float64 on the CPU, and in float32 and bfloat16 copies "
        "of one user are added up, which must not reach further than so many clip norms.",
    ),
    "350m": Cell(
        kind="steps", share=27, model="350m", meaning="A GPT-2 of 350 million parameters, all of which are trained."
    ),
    "rounds-350m": Cell(
        kind="rounds", share=9, model="350m",
        meaning="Whole rounds by phase, 256 users with a row each in expectation: sampled, charged to a ledger on "
        "disk, loaded from a store, clipped and summed, noised, stepped. One worker in the server's process, without "
        "Flower or Ray.",
    ),
    "1.1b-lora": Cell(
        kind="steps", share=11, model="1.1b-lora",
        meaning="A Llama of 1.1 billion parameters in float32, of which adapters of rank 16 on every layer are "
        "trained.",
    ),
    "7b-lora": Cell(
        kind="steps", share=11, model="7b-lora",
        meaning="A Llama of 7 billion parameters in bfloat16, of which adapters of rank 16 in float32 are trained.",
    ),
    "124m": Cell(
        kind="steps", share=8, model="124m", meaning="A GPT-2 of 124 million parameters, all of which are trained."
    ),
    "rounds-350m-ray": Cell(
        kind="rounds", share=4, model="350m", engine="ray",
        meaning="The same rounds with Flower clients on two Ray actors that share the device: what messages and "
        "processes cost beside the cell without them.",
    ),
    "350m-128k": Cell(
        kind="steps", share=4, model="350m-128k",
        meaning="The model of 350 million parameters with a vocabulary of 128,256 tokens, two and a half times as "
        "many: what the head, its loss and the tied embedding cost.",
    ),
    "350m-long": Cell(
        kind="steps", share=4, model="350m-long",
        meaning="The model of 350 million parameters on rows of 1,024 tokens, eight users in place of "
        "64: as many tokens a step, of which each unit has eight times as many.",
    ),
    "350m-checkpointing": Cell(
        kind="steps", share=3, model="350m", checkpointing=True,
        meaning="The model of 350 million parameters with activation checkpointing, a second forward "
        "pass for less memory: ours, which is not compiled then, and without privacy. Opacus goes without it.",
    ),
    "slices-350m": Cell(
        kind="slices", share=3, model="350m",
        meaning="The clipped sum of 64 users of four rows by one process, and by two and four on the same device, "
        "among which the users are shared out and which are measured together: whether fractions of a device are "
        "worth their memory.",
    ),
}  # fmt: skip
"""In order of worth."""


def size_of(cell: Cell, tiny: bool) -> tuple[str, Size]:
    """The cell's model and what that is called; a tiny one of its kind where asked."""
    if not tiny:
        return cell.model, SIZES[cell.model]
    name = {"gpt2": "tiny", "llama-lora": "tiny-lora"}[SIZES[cell.model].kind]
    return name, replace(SIZES[name], users=4, layers=1, vocabulary=128, length=16)
