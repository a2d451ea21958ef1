"""A language model's last layer and its cross-entropy in one: logits exist for a chunk of tokens at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.gradients.kernels import loss_gradient_, usable
from fedsim.gradients.model import compute_dtype, wide_dtype
from fedsim.gradients.objective import Batch, RowLosses, causal_logits
from fedsim.gradients.per_unit.products import add_product
from fedsim.gradients.per_unit.unit_gradients import least_held
from fedsim.gradients.rows.segments import Segments
from fedsim.gradients.tape import Tape
from fedsim.gradients.trial.settings import settings_of
from fedsim.rows import IGNORED_LABEL

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of one chunk: 4 MiB of float32 on a CPU, which stay in its cache."""
LEAST_POSITIONS = {"cpu": 2**7, "cuda": 2**8}
"""Of a chunk, however large the vocabulary: with fewer, reading the head's weights takes longer than the product."""
VOCABULARY_STEP = 64
"""On a GPU a head is filled up with zeros to a multiple of so many tokens."""

_plain_heads: WeakKeyDictionary[torch.nn.Module, tuple[object, bool]] = WeakKeyDictionary()
"""Of each head what its model was when it was tried, and what was found."""


def plain_head(model: torch.nn.Module, settings: tuple[object, ...] | None = None) -> torch.nn.Linear | None:
    """The Linear whose output a model returns as its logits, unchanged; None if there is none.

    Found out by trying: the head is made to return a known tensor, and the logits must be that tensor bit by bit.
    Models that cap or scale their logits fail and take the ordinary loss. A model that is another than it was is tried
    again.

    Args:
        settings: `settings_of(model)`, where that is known.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if type(head) is not torch.nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    settings = settings_of(model) if settings is None else settings
    then, plain = _plain_heads.get(head, (None, False))
    if then != settings:
        # Large and small values of both signs: a cap or a scale would change them.
        probe = torch.linspace(-300, 300, 2 * head.out_features, device=head.weight.device).view(1, 2, -1)
        batch = Batch(
            input_ids=torch.zeros(1, 2, dtype=torch.long, device=head.weight.device),
            attention_mask=None,
            labels=torch.zeros(1, 1, dtype=torch.long, device=head.weight.device),
        )
        with torch.no_grad(), _returning(head, lambda hidden: probe):
            logits = causal_logits(model, batch)
        plain = logits.shape == probe.shape and torch.equal(logits.to(probe.dtype), probe)
        _plain_heads[head] = settings, plain
    return head if plain else None


def fused_loss(
    model: torch.nn.Module, head: torch.nn.Linear, batch: Batch, coefficients: torch.Tensor, tape: Tape | None = None
) -> tuple[torch.Tensor, RowLosses]:
    """Σ over rows of coefficient · (sum of the row's label losses), and the rows' losses without a graph.

    Args:
        head: What `plain_head` returned for the model.
        coefficients: [R], one a row; or one a position, [R · T], and losses are then of positions.
        tape: Where the head's per-unit gradients go; None leaves them to autograd.

    Returns:
        The scalar loss, differentiable once, and the losses, as many as coefficients.
    """
    return head_loss(hidden_states(model, head, batch), head, batch, coefficients, tape)


def hidden_states(model: torch.nn.Module, head: torch.nn.Linear, batch: Batch) -> torch.Tensor:
    """The head's input, [R, T, d], without logits; head is what `plain_head` returned for the model."""
    with _returning(head, lambda hidden: hidden):
        return causal_logits(model, batch)


def chunk_positions(words: int, device: torch.device) -> int:
    """Of how many positions a head of so many words makes logits at a time."""
    kind = device.type if device.type in CHUNK_ELEMENTS else "cuda"
    return max(LEAST_POSITIONS[kind], CHUNK_ELEMENTS[kind] // words)


def head_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, batch: Batch, coefficients: torch.Tensor, tape: Tape | None = None
) -> tuple[torch.Tensor, RowLosses]:
    """`fused_loss` from the head's input on, [R, T, d]."""
    # The last position predicts nothing. It is carried along, unscored: matrix products of T rows a unit, often a
    # power of two, are quicker on a CPU than those of T - 1.
    labels = torch.nn.functional.pad(batch.labels, (0, 1), value=IGNORED_LABEL).flatten()
    times = len(labels) // len(coefficients)
    each = coefficients if times == 1 else coefficients.repeat_interleave(times)
    loss, losses, correct = _fused_loss(hidden.flatten(0, 1), head.weight, head.bias, labels, each, head, tape)
    of_rows = [x.view(len(coefficients), -1).sum(1) for x in (losses, labels != IGNORED_LABEL, correct)]
    return loss, RowLosses(loss_sum=of_rows[0], label_count=of_rows[1], correct=of_rows[2])


@contextmanager
def _returning(head: torch.nn.Linear, forward: Any) -> Iterator[None]:
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


class _FusedLoss(torch.autograd.Function):
    """Everything that needs the logits happens in the forward pass, chunk by chunk.

    With p the softmax of a position's logits, y its label and a its coefficient, the gradient with respect to the
    logits is a · (p − onehot(y)). It is formed once, used for the hidden states' and the weight's gradients, and
    dropped, or kept for the tape where the head's per-unit gradients would be larger.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        coefficients: torch.Tensor,
        head: Any,
        tape: Tape | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Head(hidden.to(dtype).contiguous(), weight, bias, labels, coefficients)
            if tape is not None and tape.wants(head.weight):
                work.record(tape, head)
            else:
                work.run(ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        ctx.save_for_backward(work.hidden_gradient.to(hidden.dtype), work.weight_gradient, work.bias_gradient)
        ctx.mark_non_differentiable(work.losses, work.correct)
        return (work.losses * coefficients).sum(), work.losses, work.correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scaled = [None if g is None else g * gradient.to(g.dtype) for g in (hidden, weight, bias)]
        return *scaled, None, None, None, None


_fused_loss: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = _FusedLoss.apply
"""torch leaves the call untyped."""


class _Head:
    """The chunks of one fused loss, of M positions.

    Args:
        hidden: [M, d], contiguous.
        labels: int64 [M].
        coefficients: [M].
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        coefficients: torch.Tensor,
    ) -> None:
        self.hidden, self.width, self.by_kernel = hidden, len(weight), usable(hidden)
        self.weight = weight.detach().to(hidden.dtype)
        self.bias = None if bias is None else bias.detach().to(hidden.dtype)
        if self.by_kernel and self.width % VOCABULARY_STEP:
            # A vocabulary of 50,257 would keep every product of the head on a GPU's slowest path.
            more = -self.width % VOCABULARY_STEP
            self.weight = torch.nn.functional.pad(self.weight, (0, 0, 0, more))
            self.bias = None if self.bias is None else torch.nn.functional.pad(self.bias, (0, more))
        self.labels, self.coefficients = labels, coefficients
        wide = wide_dtype(hidden.dtype)
        self.losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        self.correct = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        self.hidden_gradient = torch.empty_like(hidden)
        self.weight_gradient: torch.Tensor | None = None
        self.bias_gradient: torch.Tensor | None = None
        self.chunk = chunk_positions(self.width, hidden.device)

    def run(self, want_weight: bool, want_bias: bool) -> None:
        """Losses and gradients of everything for autograd."""
        if want_weight:
            self.weight_gradient = self.losses.new_empty(self.width, self.weight.shape[1])
        bias = torch.zeros(self.width, dtype=self.losses.dtype, device=self.weight.device)
        for start in range(0, len(self.hidden), self.chunk):
            places = slice(start, start + self.chunk)
            gradient = self.logit_gradient(places)
            if self.weight_gradient is not None:
                add_product(self.weight_gradient, gradient.t(), self.weighted(places), first=start == 0)
            if want_bias:
                bias += gradient.t().to(bias.dtype) @ self.coefficients[places].to(bias.dtype)
        self.bias_gradient = bias if want_bias else None

    def record(self, tape: Tape, head: Any) -> None:
        """The same, with the weight's and the bias's gradients left on the tape, for each unit."""
        segments = tape.segments.times(len(self.hidden) // tape.rows)
        least = least_held(self.width, self.hidden.shape[1], self.hidden.element_size())
        first = int(np.searchsorted(segments.lengths, least))
        kept = self.hidden.new_empty(int(segments.offsets[first]), len(self.weight))
        held = self.losses.new_empty(len(segments) - first, self.width, self.weight.shape[1])
        biases = self.losses.new_zeros(len(segments), self.width) if tape.wants(head.bias) else None
        self.hidden_gradient[segments.total :] = 0  # of what belongs to no unit
        # What is kept whole is made whole, unless something of its size would be made beside it.
        whole = self.by_kernel and biases is None
        for places, units in self._chunks(segments, first, whole):
            room = kept[places] if places.stop <= len(kept) else None
            gradient = self.logit_gradient(places, room)
            for unit in units if units.stop > first or biases is not None else ():
                begin, end = (max(int(x) - places.start, 0) for x in segments.offsets[unit : unit + 2])
                own = slice(begin, min(end, places.stop - places.start))
                if unit >= first:
                    within = slice(places.start + own.start, places.start + own.stop)
                    begun = within.start > segments.offsets[unit]
                    add_product(held[unit - first], gradient[own].t(), self.weighted(within), first=not begun)
                if biases is not None:
                    coefficients = self.coefficients[places][own].to(biases.dtype)
                    biases[unit] += gradient[own].t().to(biases.dtype) @ coefficients
        if len(held):
            tape.at(head.weight).add_held(held)
        if first:
            factors = kept[:, : self.width], self.weighted(slice(0, len(kept)))
            tape.at(head.weight).outers.append(segments.cut(0, first, *factors))
        if biases is not None:
            tape.at(head.bias).add_held(biases)

    def weighted(self, places: slice) -> torch.Tensor:
        """Hidden states times their coefficients: the cheaper side to scale."""
        return self.hidden[places] * self.coefficients[places, None].to(self.hidden.dtype)

    def logit_gradient(self, places: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """p − onehot(y), [n, V] in hidden's dtype, without coefficients; written to out where that is given.

        On the way it writes the positions' losses, correct predictions and the hidden states' gradients.
        """
        labels = self.labels[places]
        gradient = self._in_place(places, labels, out) if self.by_kernel else self._plain(places, labels, out)
        torch.matmul(gradient, self.weight, out=self.hidden_gradient[places])
        self.hidden_gradient[places] *= self.coefficients[places, None].to(self.hidden.dtype)
        return gradient[:, : self.width]

    def _in_place(self, places: slice, labels: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """In two passes over the logits, which are never copied."""
        hidden = self.hidden[places]
        gradient = hidden.new_empty(len(hidden), len(self.weight)) if out is None else out
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=gradient)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=gradient)
        self.losses[places], self.correct[places] = loss_gradient_(gradient[:, : self.width], labels)
        return gradient

    def _plain(self, places: slice, labels: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        scored, place = labels != IGNORED_LABEL, labels.clamp(min=0).unsqueeze(-1)
        logits = self._logits(places, out)
        largest, own = logits.amax(-1, keepdim=True), logits.gather(-1, place)
        self.correct[places] = (own >= largest)[:, 0] & scored
        # In the logits' place: on a CPU what is copied falls out of the caches.
        gradient = torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)
        # The largest probability, 1 / Σ exp(logit − largest), is at least 1 / V, however small that of the label.
        losses = largest - own - gradient.amax(-1, keepdim=True).log()
        self.losses[places] = losses[:, 0].masked_fill(~scored, 0)
        gradient.scatter_add_(-1, place, gradient.new_full((), -1.0).expand(place.shape))
        if gradient.is_cuda:
            gradient.masked_fill_(~scored.unsqueeze(-1), 0)
        else:
            gradient.index_fill_(0, (~scored).nonzero()[:, 0], 0)
        gradient = gradient.to(self.hidden.dtype)
        if out is not None and gradient is not out:
            out.copy_(gradient)
        return gradient

    def _logits(self, places: slice, out: torch.Tensor | None) -> torch.Tensor:
        """[n, V] in losses' dtype, written to out where that is of it."""
        hidden = self.hidden[places]
        if out is not None and out.dtype == self.losses.dtype and self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.nn.functional.linear(hidden, self.weight, self.bias).to(self.losses.dtype)

    def _chunks(self, segments: Segments, first: int, whole: bool) -> Iterator[tuple[slice, range]]:
        """Chunks of positions and whose they are: none has units on both sides of `first`; those before may be one."""
        middle = int(segments.offsets[first])
        for begin, stop, chunk in ((0, middle, middle if whole else self.chunk), (middle, segments.total, self.chunk)):
            for start in range(begin, stop, max(1, chunk)):
                end = min(start + chunk, stop)
                one = int(np.searchsorted(segments.offsets, start, side="right")) - 1
                yield slice(start, end), range(one, int(np.searchsorted(segments.offsets, end)))
