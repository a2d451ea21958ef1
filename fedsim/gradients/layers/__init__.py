"""One file a kind of layer: from a layer's inputs and output gradients to terms of its parameters' gradients."""

import torch

from fedsim.gradients.layers import embedding, generic, linear, normalization
from fedsim.gradients.tape import Record

KINDS = (linear, embedding, normalization)


def rule_for(module: torch.nn.Module) -> tuple[str, Record]:
    """A name for the layer's kind and its rule; any layer that no kind fits is recomputed unit by unit."""
    for kind in KINDS:
        rule = kind.rule(module)
        if rule is not None:
            return rule
    return generic.rule(module)
