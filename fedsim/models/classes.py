"""Names of a classifier's classes: those of the data, kept in the model, so that who loads it reads names."""

from typing import Any

from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.given import said_of, say_of

FEW = 5
"""Names that an error lists."""


def named_classes(model: Any) -> tuple[str, ...]:
    """Names of a classifier's classes, by output; () where it has none but LABEL_0, LABEL_1, …"""
    names = tuple(str(name) for _, name in sorted(said_of(model).get("id2label", {}).items()))
    return () if names == tuple(f"LABEL_{place}" for place in range(len(names))) else names


def name_classes(model: Any, config: ModelConfig, classes: list[str]) -> None:
    """Give a classifier the names of the data's classes, in its configuration.

    Args:
        model: The classifier.
        config: What was asked for.
        classes: The data's, by class number; none where it has no labels.

    Raises:
        InvalidInput: The data has no labels, or another number of classes than the model; or the model has some of
            these names already, and for other outputs.
    """
    if config.task != "sequence-classification":
        return
    if not classes:
        raise without_labels()
    if len(classes) != config.num_labels:
        few = ", ".join(classes[:FEW]) + (", …" if len(classes) > FEW else "")
        hint = "Set it; or name all classes by --data.label-names, in order, if the data lacks some."
        raise InvalidInput(
            "model.num-labels", config.num_labels, f"{len(classes)}, the labels in the data: {few}", hint
        )
    own = named_classes(model)
    if own and own != tuple(classes) and set(own) & set(classes):
        hint = f"Name them in the model's order: --data.label-names {' '.join(own)}."
        raise InvalidInput("data.label-names", " ".join(classes), "the classes of the model, in its order", hint)
    say_of(model, "id2label", dict(enumerate(classes)))
    say_of(model, "label2id", {name: place for place, name in enumerate(classes)})


def without_labels() -> InvalidInput:
    """Data without labels cannot train or measure a classifier."""
    hint = "Name the column with the class of each text."
    return InvalidInput("data.label-column", None, "given with --model.task sequence-classification", hint)
