"""An alarm: parameters that training was to change and did not."""

import numpy as np

from fedsim.errors import InvalidInput
from fedsim.gradients.model import ParameterLayout


def unchanged_parameters(layout: ParameterLayout, before: np.ndarray, after: np.ndarray) -> tuple[str, ...]:
    """Names of the trainable parameters of which not one value changed, bit for bit.

    After a round with noise there is none: noise reaches every value. One that stayed as it was did not take part (a
    frozen or forgotten adapter, a vector that never reached the optimizer). Without noise, one half of a LoRA adapter
    stays for the first step, since the other half starts as zero.

    Args:
        layout: Where each parameter lies.
        before, after: float32 [P], the trainable parameters.

    Raises:
        InvalidInput: A vector is not of the layout's size.
    """
    for name, flat in (("before", before), ("after", after)):
        if np.shape(flat) != (layout.size,):
            raise InvalidInput(name, np.shape(flat), f"a vector of {layout.size} values")
    moved = np.asarray(before) != np.asarray(after)
    pieces = zip(layout.names, layout.offsets[:-1], layout.offsets[1:], strict=True)
    return tuple(name for name, start, stop in pieces if not moved[start:stop].any())
