"""Adapters added into the weights of their base: a plain model that computes the same, and needs no PEFT."""

import contextlib
import dataclasses
from typing import Any

import torch

from fedsim.errors import InvalidInput
from fedsim.models.load import LoadedModel
from fedsim.models.lora import adapters_of, single_threaded
from fedsim.models.quiet import quiet_transformers


def merge(loaded: LoadedModel) -> LoadedModel:
    """The model with its adapters added into the base, which is changed in place: `loaded` is of no use afterwards.

    It is float32 then, whatever the base was. Where an embedding shared with the head has
    adapters or was trained in full, the two have weights of their own from then on.

    Args:
        loaded: A model with adapters.

    Raises:
        InvalidInput: There are no adapters; their base is quantised, so that sums would be rounded to a few values; or
            a merged weight is not finite.
    """
    if not loaded.adapted:
        raise InvalidInput("model.path", loaded.config.path, "a model with adapters", "There is nothing to merge.")
    require_mergeable(loaded.config.quantise)
    adapted: Any = loaded.model
    with single_threaded(), quiet_transformers():
        adapted.float()
        _untie(adapted)
        try:
            plain = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise InvalidInput("model.path", loaded.config.path, "adapters that can be merged", str(error)) from error
    return dataclasses.replace(loaded, model=plain.eval(), config=loaded.config.merged(loaded.base))


def require_mergeable(quantise: str) -> None:
    """Refuse to merge into a base of 4 bits a weight.

    Raises:
        InvalidInput: It is one.
    """
    if quantise != "none":
        hint = "Adapters were trained on the rounded base, of which their sums are none: keep them beside it."
        raise InvalidInput("model.quantise", quantise, "none where adapters are merged", hint)


def _untie(adapted: Any) -> None:
    """Give the head weights of its own where only one of it and the embedding is adapted."""
    model = adapted.get_base_model()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {id(layer) for _, layer in adapters_of(adapted)}
    if head is None or not (id(table) in layers or id(head) in layers):
        return
    bases = [getattr(one, "base_layer", one) for one in (table, head)]
    with contextlib.suppress(AttributeError):
        if bases[0].weight is bases[1].weight:
            bases[1].weight = torch.nn.Parameter(bases[1].weight.detach().clone(), requires_grad=False)
            model.config.get_text_config().tie_word_embeddings = False
            model.config.tie_word_embeddings = False
