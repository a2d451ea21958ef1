"""A language model's last layer and its cross-entropy in one: logits exist for a chunk of tokens at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.gradients.model import compute_dtype, wide_dtype
from fedsim.gradients.objective import Batch, RowLosses, causal_logits
from fedsim.gradients.per_unit.formed_again import FormedAgain
from fedsim.gradients.per_unit.logits import HeadInputs, Logits, Scores
from fedsim.gradients.per_unit.outer_products import least_held
from fedsim.gradients.per_unit.products import add_product
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments, Term
from fedsim.gradients.tape import Tape
from fedsim.gradients.trial.settings import settings_of
from fedsim.rows import IGNORED_LABEL

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of one chunk: 4 MiB of float32 on a CPU, which stay in its cache."""
LEAST_POSITIONS = {"cpu": 2**7, "cuda": 2**8}
"""Of a chunk, however large the vocabulary: with fewer, reading the head's weights takes longer than the product."""
KEPT_ELEMENTS = {"cpu": 2**26, "cuda": 2**29}
"""Values of the logits' gradient that a micro-batch keeps for the sum at most: 256 MiB of float32, 1 GiB of bfloat16.

Kept, they cost a write and a read; formed again, one more product of the head. But they are as many as tokens times
words: of a large vocabulary, more than everything else that a pass leaves.
"""
GROUP_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
"""Values of those that are formed again together: each group reads and writes the whole weight's sum once."""

_plain_heads: WeakKeyDictionary[torch.nn.Module, tuple[object, bool]] = WeakKeyDictionary()
"""Of each head what its model was when it was tried, and what was found."""


def plain_head(model: torch.nn.Module, settings: tuple[object, ...] | None = None) -> torch.nn.Linear | None:
    """The Linear whose output a model returns as its logits, unchanged, and asks for once; None if there is none.

    Found out by trying: the head is made to return a known tensor, and the logits must be that tensor bit by bit.
    Models that cap or scale their logits fail and take the ordinary loss. A model that is another than it was is tried
    again.

    Args:
        settings: `settings_of(model)`, where that is known.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if type(head) is not torch.nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return None  # what a hook, or a forward pass put in the place of the class's own, does would be left out
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
        given: list[torch.Tensor] = []

        def known(hidden: torch.Tensor) -> torch.Tensor:
            given.append(probe.clone())  # a copy, for a model may write to its logits where they are
            return given[-1]

        with torch.no_grad(), _returning(head, known):
            logits = causal_logits(model, batch)
        same = logits.shape == probe.shape and torch.equal(logits.to(probe.dtype), probe)
        plain = same and len(given) == 1
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
    return max(_on(device, LEAST_POSITIONS), _on(device, CHUNK_ELEMENTS) // words)


def _on(device: torch.device, limits: dict[str, int]) -> int:
    """A device's limit; one of another kind counts as a GPU."""
    return limits.get(device.type, limits["cuda"])


def head_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, batch: Batch, coefficients: torch.Tensor, tape: Tape | None = None
) -> tuple[torch.Tensor, RowLosses]:
    """`fused_loss` from the head's input on, [R, T, d]."""
    # The last position predicts nothing. It is carried along, unscored: matrix products of T rows a unit, often a
    # power of two, are quicker on a CPU than those of T - 1.
    labels = torch.nn.functional.pad(batch.labels, (0, 1), value=IGNORED_LABEL).flatten()
    times = len(labels) // len(coefficients)
    each = coefficients if times == 1 else coefficients.repeat_interleave(times)
    words = batch.input_ids.flatten()
    loss, losses, correct = _fused_loss(hidden.flatten(0, 1), head.weight, head.bias, labels, words, each, head, tape)
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
    dropped. Where the head's per-unit gradients would be larger it is kept for the tape; or formed again for the sum,
    if that would be too much to keep.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        words: torch.Tensor,
        coefficients: torch.Tensor,
        head: Any,
        tape: Tape | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            work = _Head(hidden.detach().to(dtype).contiguous(), weight, bias, labels, coefficients)
            if tape is not None and (tape.wants(head.weight) or tape.wants(head.bias)):
                work.record(tape, head, words)
            else:
                work.run(ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2])
        ctx.save_for_backward(work.hidden_gradient.to(hidden.dtype), work.weight_gradient, work.bias_gradient)
        losses, correct = work.scores
        ctx.mark_non_differentiable(losses, correct)
        return (losses * coefficients).sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scaled = [None if g is None else g * gradient.to(g.dtype) for g in (hidden, weight, bias)]
        return *scaled, None, None, None, None, None


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
        self.chunk = chunk_positions(len(weight), hidden.device)
        self.inputs = HeadInputs(hidden, weight, bias, labels, self.chunk)
        self.logits, self.shape = Logits(self.inputs), weight.shape
        self.coefficients = coefficients
        wide = wide_dtype(hidden.dtype)
        losses = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        self.scores = Scores(losses, torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device))
        self.hidden_gradient = torch.empty_like(hidden)
        self.weight_gradient: torch.Tensor | None = None
        self.bias_gradient: torch.Tensor | None = None

    def run(self, want_weight: bool, want_bias: bool) -> None:
        """Losses and gradients of everything for autograd."""
        if want_weight:
            self.weight_gradient = self._new(self.shape)
        bias = torch.zeros(self.shape[0], dtype=self.scores.losses.dtype, device=self.coefficients.device)
        for start in range(0, len(self.coefficients), self.chunk):
            places = slice(start, min(start + self.chunk, len(self.coefficients)))
            gradient = self.logit_gradient(places)
            if self.weight_gradient is not None:
                add_product(self.weight_gradient, gradient.t(), self.weighted(places), first=start == 0)
            if want_bias:
                bias += self._of_bias(gradient, places)
        self.bias_gradient = bias if want_bias else None

    def record(self, tape: Tape, head: Any, words: torch.Tensor) -> None:
        """The same, with the weight's and the bias's gradients left on the tape, for each unit; one may be frozen.

        Args:
            words: int64 [M], what the model is given at the positions.
        """
        segments = tape.segments.times(len(words) // tape.rows)
        biases = self._new((len(segments), self.shape[0])).zero_() if tape.wants(head.bias) else None
        self.hidden_gradient[segments.total :] = 0  # of what belongs to no unit
        if tape.wants(head.weight):
            self._record_weight(tape.at(head.weight), segments, words, biases)
        else:
            for places, units in _chunks(segments, 0, len(segments), self.chunk):
                self._add_biases(biases, segments, units, places, self.logit_gradient(places))
        if biases is not None:
            tape.at(head.bias).add_held(biases)

    def _record_weight(
        self, gradients: UnitGradients, segments: Segments, words: torch.Tensor, biases: torch.Tensor | None
    ) -> None:
        """The weight's gradients, and on the way what biases are given of theirs."""
        least = least_held(self.shape[0], self.shape[1], self.inputs.hidden.element_size())
        first = int(np.searchsorted(segments.lengths, least))
        if first < len(segments):
            gradients.add_held(self._held(segments, first, biases))
        if first:
            small, (words,) = segments.cut(0, first, words)
            if small.total * self.logits.columns <= _on(words.device, KEPT_ELEMENTS):
                gradients.outers.append(self._kept(small, biases))
            else:
                gradients.add_formed_again(self._formed_again(small, words, biases))

    def weighted(self, places: slice) -> torch.Tensor:
        """Hidden states times their coefficients: the cheaper side to scale."""
        hidden = self.inputs.hidden[places]
        return hidden * self.coefficients[places, None].to(hidden.dtype)

    def logit_gradient(self, places: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """p − onehot(y), [n, V] in hidden's dtype, without coefficients; written to out where that is given.

        On the way it writes the positions' losses, correct predictions and the hidden states' gradients.
        """
        gradient = self.logits.gradient(places, out, self.scores)
        torch.matmul(gradient, self.logits.weight, out=self.hidden_gradient[places])
        self.hidden_gradient[places] *= self.coefficients[places, None].to(gradient.dtype)
        return gradient[:, : self.shape[0]]

    def _held(self, segments: Segments, first: int, biases: torch.Tensor | None) -> torch.Tensor:
        """The gradients of units from the first on that are held, [units, V, d]."""
        held = self._new((len(segments) - first, *self.shape))
        for places, units in _chunks(segments, first, len(segments), self.chunk):
            gradient = self.logit_gradient(places)
            for unit, own, part in _parts(segments, units, places, gradient):
                begun = own.start > segments.offsets[unit]
                add_product(held[unit - first], part.t(), self.weighted(own), first=not begun)
            self._add_biases(biases, segments, units, places, gradient)
        return held

    def _kept(self, segments: Segments, biases: torch.Tensor | None) -> Term:
        """Factors of units whose gradients are larger: the logits' gradient, and hidden states times coefficients."""
        kept = self.inputs.hidden.new_empty(segments.total, self.logits.columns)
        # What is kept whole is made whole, unless something of its size would be made beside it.
        chunk = len(kept) if self.logits.by_kernel and biases is None else self.chunk
        for places, units in _chunks(segments, 0, len(segments), chunk):
            gradient = self.logit_gradient(places, kept[places])
            self._add_biases(biases, segments, units, places, gradient)
        return segments, (kept[:, : self.shape[0]], self.weighted(slice(0, len(kept))))

    def _formed_again(self, segments: Segments, words: torch.Tensor, biases: torch.Tensor | None) -> FormedAgain:
        """The same with a logits' gradient that would be too large to keep, and is dropped."""
        positions = max(self.chunk, _on(words.device, GROUP_ELEMENTS) // self.logits.columns)
        right = self.weighted(slice(0, segments.total))
        term = FormedAgain(segments, self.inputs, right, words, positions)
        room = right.new_empty(term.largest, self.logits.columns)
        for units in term.groups:
            places = term.places(units)
            gradient = self.logit_gradient(places, room[: places.stop - places.start])
            term.measure(units, gradient)
            self._add_biases(biases, segments, range(units.start, units.stop), places, gradient)
        return term

    def _add_biases(
        self,
        biases: torch.Tensor | None,
        segments: Segments,
        units: range,
        places: slice,
        gradient: torch.Tensor,
    ) -> None:
        """Add what a chunk's positions leave to its units' gradients of the bias, [u, V], if they are wanted."""
        if biases is not None:
            for unit, own, part in _parts(segments, units, places, gradient):
                biases[unit] += self._of_bias(part, own)

    def _of_bias(self, gradient: torch.Tensor, places: slice) -> torch.Tensor:
        wide = self.scores.losses.dtype
        return gradient.t().to(wide) @ self.coefficients[places].to(wide)

    def _new(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for sums, of the dtype in which they are added up."""
        return self.scores.losses.new_empty(shape)


def _chunks(segments: Segments, first: int, stop: int, chunk: int) -> Iterator[tuple[slice, range]]:
    """The positions of neighbouring units, so many at a time, and whose they are."""
    begin, end = segments.offsets[[first, stop]].tolist()
    for start in range(begin, end, max(1, chunk)):
        places = slice(start, min(start + chunk, end))
        one = int(np.searchsorted(segments.offsets, start, side="right")) - 1
        yield places, range(one, int(np.searchsorted(segments.offsets, places.stop)))


def _parts(
    segments: Segments, units: range, places: slice, vectors: torch.Tensor
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Each unit, which of its positions are among some, and the vectors of these."""
    for unit in units:
        begin, end = segments.offsets[[unit, unit + 1]].tolist()
        own = slice(max(begin, places.start), min(end, places.stop))
        yield unit, own, vectors[own.start - places.start : own.stop - places.start]
