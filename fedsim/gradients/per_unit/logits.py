"""A head's logits, for some positions at a time, and in their place the gradient of the positions' losses."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedsim.gradients.kernels import loss_gradient_, usable
from fedsim.gradients.model import wide_dtype
from fedsim.rows import IGNORED_LABEL

VOCABULARY_STEP = 64
"""On a GPU a head is filled up with zeros to a multiple of so many tokens."""


@dataclass(frozen=True)
class HeadInputs:
    """All that the logits of M positions and their losses are computed from.

    Attributes:
        hidden: [M, d], contiguous, in the dtype of products, without a graph.
        weight: [V, d], of any dtype.
        bias: [V], of any dtype, or None.
        labels: int64 [M], IGNORED_LABEL where nothing is scored.
        piece: Positions whose logits are formed at a time where that cannot be done in the gradient's place.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    piece: int

    @property
    def versions(self) -> list[int]:
        """How often each tensor was written to."""
        tensors = (self.hidden, self.weight, self.bias, self.labels)
        return [tensor._version for tensor in tensors if tensor is not None]


class Scores(NamedTuple):
    """What is told of M positions: losses in nats, float32 or wider; whether no logit is above the label's, bool."""

    losses: torch.Tensor
    correct: torch.Tensor


class Logits:
    """The logits of some positions, and the gradient of their losses, p − onehot(label), in the logits' place.

    p is the softmax of a position's logits; where nothing is scored the gradient is zero. The same positions asked for
    again have the same gradient bit by bit, on a device whose operations give the same from call to call.

    Args:
        inputs: What they are computed from.

    Attributes:
        width: Tokens of the vocabulary, V.
        weight: [columns, d], V filled up with zeros where that is quicker, in hidden's dtype.
        by_kernel: Whether a kernel of ours does it, all in place.
    """

    def __init__(self, inputs: HeadInputs) -> None:
        hidden, bias = inputs.hidden, inputs.bias
        self.inputs, self.width, self.by_kernel = inputs, len(inputs.weight), usable(hidden)
        self.weight = inputs.weight.detach().to(hidden.dtype)
        self.bias = None if bias is None else bias.detach().to(hidden.dtype)
        if self.by_kernel and self.width % VOCABULARY_STEP:
            # A vocabulary of 50,257 would keep every product of the head on a GPU's slowest path.
            more = -self.width % VOCABULARY_STEP
            self.weight = torch.nn.functional.pad(self.weight, (0, 0, 0, more))
            self.bias = None if self.bias is None else torch.nn.functional.pad(self.bias, (0, more))
        self.wide = wide_dtype(hidden.dtype)

    @property
    def columns(self) -> int:
        """Of what `gradient` returns: V, and what the vocabulary is filled up with."""
        return len(self.weight)

    def gradient(self, places: slice, out: torch.Tensor | None = None, scores: Scores | None = None) -> torch.Tensor:
        """The gradient of some positions' losses, [n, columns] in hidden's dtype; of these V count.

        Args:
            out: Where it is written; None for a new tensor.
            scores: Where the positions' losses and hits are written, [M]; None where they are known.
        """
        piece = places.stop - places.start if self.by_kernel else self.inputs.piece
        if out is None or places.stop - places.start <= piece:
            return (self._in_place if self.by_kernel else self._plain)(places, out, scores)
        for start in range(places.start, places.stop, piece):
            stop = min(start + piece, places.stop)
            self._plain(slice(start, stop), out[start - places.start : stop - places.start], scores)
        return out

    def _in_place(self, places: slice, out: torch.Tensor | None, scores: Scores | None) -> torch.Tensor:
        """In two passes over the logits, which are never copied."""
        hidden = self.inputs.hidden[places]
        gradient = hidden.new_empty(len(hidden), self.columns) if out is None else out
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=gradient)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=gradient)
        losses, correct = loss_gradient_(gradient[:, : self.width], self.inputs.labels[places])
        if scores is not None:
            scores.losses[places], scores.correct[places] = losses, correct
        return gradient

    def _plain(self, places: slice, out: torch.Tensor | None, scores: Scores | None) -> torch.Tensor:
        labels = self.inputs.labels[places]
        scored, place = labels != IGNORED_LABEL, labels.clamp(min=0).unsqueeze(-1)
        logits = self._logits(places, out)
        if scores is not None:
            largest, own = logits.amax(-1, keepdim=True), logits.gather(-1, place)
            scores.correct[places] = (own >= largest)[:, 0] & scored
        # In the logits' place: on a CPU what is copied falls out of the caches.
        gradient = torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)
        if scores is not None:
            # The largest probability, 1 / Σ exp(logit − largest), is at least 1 / V, however small that of the label.
            losses = largest - own - gradient.amax(-1, keepdim=True).log()
            scores.losses[places] = losses[:, 0].masked_fill(~scored, 0)
        gradient.scatter_add_(-1, place, gradient.new_full((), -1.0).expand(place.shape))
        if gradient.is_cuda:
            gradient.masked_fill_(~scored.unsqueeze(-1), 0)
        else:
            gradient.index_fill_(0, (~scored).nonzero()[:, 0], 0)
        gradient = gradient.to(self.inputs.hidden.dtype)
        if out is None or gradient is out:
            return gradient
        return out.copy_(gradient)

    def _logits(self, places: slice, out: torch.Tensor | None) -> torch.Tensor:
        """[n, V], float32 or wider, written to out where that is of it."""
        hidden = self.inputs.hidden[places]
        if out is not None and out.dtype == self.wide and self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.nn.functional.linear(hidden, self.weight, self.bias).to(self.wide)
