"""A language model's last layer and its cross-entropy in one: logits exist for a chunk of tokens at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fedsim.gradients.kernels import loss_gradient_, usable
from fedsim.gradients.model import compute_dtype, wide_dtype
from fedsim.gradients.objective import Batch, RowLosses, causal_logits
from fedsim.gradients.per_unit.unit_gradients import add_product, batched_outer, holds_gradient
from fedsim.gradients.tape import Tape
from fedsim.gradients.units import Group
from fedsim.rows import IGNORED_LABEL

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of one chunk: 4 MiB of float32 on a CPU, which stay in its cache."""
VOCABULARY_STEP = 64
"""On a GPU a head is filled up with zeros to a multiple of so many tokens."""

_plain_heads: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


def plain_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The Linear whose output a model returns as its logits, unchanged; None if there is none.

    Found out by trying: the head is made to return a known tensor, and the logits must be that tensor bit by bit.
    Models that cap or scale their logits fail and take the ordinary loss.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if type(head) is not torch.nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    if head not in _plain_heads:
        # Large and small values of both signs: a cap or a scale would change them.
        probe = torch.linspace(-300, 300, 2 * head.out_features, device=head.weight.device).view(1, 2, -1)
        batch = Batch(
            input_ids=torch.zeros(1, 2, dtype=torch.long, device=head.weight.device),
            attention_mask=None,
            labels=torch.zeros(1, 1, dtype=torch.long, device=head.weight.device),
        )
        with torch.no_grad(), _returning(head, lambda hidden: probe):
            logits = causal_logits(model, batch)
        _plain_heads[head] = logits.shape == probe.shape and torch.equal(logits.to(probe.dtype), probe)
    return head if _plain_heads[head] else None


def fused_loss(
    model: torch.nn.Module, head: torch.nn.Linear, batch: Batch, coefficients: torch.Tensor, tape: Tape | None = None
) -> tuple[torch.Tensor, RowLosses]:
    """Σ over rows of coefficient · (sum of the row's label losses), and the rows' losses without a graph.

    Args:
        head: What `plain_head` returned for the model.
        coefficients: [R], one a row.
        tape: Where the head's per-unit gradients go; None leaves them to autograd.

    Returns:
        The scalar loss, differentiable once, and the losses [R].
    """
    with _returning(head, lambda hidden: hidden):
        hidden = causal_logits(model, batch)
    return head_loss(hidden, head, batch, coefficients, tape)


def head_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, batch: Batch, coefficients: torch.Tensor, tape: Tape | None = None
) -> tuple[torch.Tensor, RowLosses]:
    """`fused_loss` from the head's input on, [R, T, d]."""
    # The last position predicts nothing. It is carried along, unscored: matrix products of T rows a unit, often a
    # power of two, are quicker on a CPU than those of T - 1.
    labels = torch.nn.functional.pad(batch.labels, (0, 1), value=IGNORED_LABEL)
    loss, loss_sum, correct = _fused_loss(hidden, head.weight, head.bias, labels, coefficients, head, tape)
    scored = batch.labels != IGNORED_LABEL
    return loss, RowLosses(loss_sum=loss_sum, label_count=scored.sum(1), correct=correct)


@contextmanager
def _returning(head: torch.nn.Linear, forward: Any) -> Iterator[None]:
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


class _FusedLoss(torch.autograd.Function):
    """Everything that needs the logits happens in the forward pass, chunk by chunk.

    With p the softmax of a position's logits, y its label and a its row's coefficient, the gradient with respect to
    the logits is a · (p − onehot(y)). It is formed once, used for the hidden states' and the weight's gradients, and
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
    """The chunks of one fused loss."""

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
        self.correct = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        self.hidden_gradient = torch.empty_like(hidden)
        self.weight_gradient: torch.Tensor | None = None
        self.bias_gradient: torch.Tensor | None = None
        limit = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
        self.chunk_rows = max(1, limit // max(1, hidden.shape[1] * len(weight)))

    def run(self, want_weight: bool, want_bias: bool) -> None:
        """Losses and gradients of everything for autograd."""
        if want_weight:
            self.weight_gradient = self.losses.new_zeros(self.width, self.weight.shape[1])
        bias = torch.zeros(self.width, dtype=self.losses.dtype, device=self.weight.device)
        for start in range(0, len(self.hidden), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            gradient = self.logit_gradient(rows)
            if self.weight_gradient is not None:
                add_product(self.weight_gradient, gradient.flatten(0, 1).t(), self.weighted(rows).flatten(0, 1))
            if want_bias:
                bias += torch.einsum("rnv,r->v", gradient.to(bias.dtype), self.coefficients[rows])
        self.bias_gradient = bias if want_bias else None

    def record(self, tape: Tape, head: Any) -> None:
        """The same, with the weight's and the bias's gradients left on the tape, for each unit."""
        for number, group in enumerate(tape.groups):
            tokens = group.rows_per_unit * self.hidden.shape[1]
            if holds_gradient(tokens, self.width, self.hidden.shape[-1], self.hidden.element_size()):
                tape.at(number, head.weight).add_held(self._unit_gradients(tape, head, number))
            else:
                kept = self._room(group.size * group.rows_per_unit)
                # What is kept whole is made whole, unless something of its size would be made beside it.
                whole = self.by_kernel and not tape.wants(head.bias)
                for rows in [group.rows] if whole else self._chunks(group):
                    place = slice(rows.start - group.rows.start, rows.stop - group.rows.start)
                    self._recorded(tape, head, number, rows, kept[place])
                tape.at(number, head.weight).outers.append(
                    (
                        kept.view(group.size, tokens, -1)[..., : self.width],
                        self.weighted(group.rows).view(group.size, tokens, -1),
                    )
                )

    def weighted(self, rows: slice) -> torch.Tensor:
        """Hidden states times their rows' coefficients: the cheaper side to scale."""
        return self.hidden[rows] * self.coefficients[rows, None, None].to(self.hidden.dtype)

    def logit_gradient(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """p − onehot(y), [rows, n, V] in hidden's dtype, without coefficients; written to out where that is given.

        On the way it writes the rows' losses, their correct predictions and the hidden states' gradients.
        """
        labels = self.labels[rows]
        scored = labels != IGNORED_LABEL
        gradient = (
            self._in_place(rows, labels, out) if self.by_kernel else self._chunk_gradient(rows, labels, scored, out)
        )
        torch.matmul(gradient, self.weight, out=self.hidden_gradient[rows])
        self.hidden_gradient[rows] *= self.coefficients[rows, None, None].to(self.hidden.dtype)
        return gradient[..., : self.width]

    def _in_place(self, rows: slice, labels: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """In two passes over the logits, which are never copied."""
        gradient = self._room(len(labels)) if out is None else out
        flat, hidden = gradient.flatten(0, 1), self.hidden[rows].flatten(0, 1)
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=flat)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=flat)
        losses, right = loss_gradient_(flat[:, : self.width], labels.flatten())
        self.losses[rows] = losses.view(labels.shape).sum(1)
        self.correct[rows] = right.view(labels.shape).sum(1)
        return gradient

    def _chunk_gradient(
        self, rows: slice, labels: torch.Tensor, scored: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        place = labels.clamp(min=0).unsqueeze(-1)
        logits = torch.nn.functional.linear(self.hidden[rows], self.weight, self.bias).to(self.losses.dtype)
        right = (logits.gather(-1, place) >= logits.amax(-1, keepdim=True))[..., 0]
        self.correct[rows] = (right & scored).sum(1)
        in_place = out is not None and out.dtype == logits.dtype
        gradient = torch.log_softmax(logits, -1, out=out if in_place else None)
        self.losses[rows] = -gradient.gather(-1, place)[..., 0].masked_fill(~scored, 0).sum(1)
        gradient.exp_()
        gradient.scatter_add_(-1, place, gradient.new_full((), -1.0).expand(place.shape))
        if gradient.is_cuda:
            gradient.masked_fill_(~scored.unsqueeze(-1), 0)
        else:
            gradient.flatten(0, 1).index_fill_(0, (~scored).flatten().nonzero()[:, 0], 0)
        gradient = gradient.to(self.hidden.dtype)
        if out is not None and not in_place:
            out.copy_(gradient)
        return gradient

    def _room(self, rows: int) -> torch.Tensor:
        """For the logits of rows, and of what the weight was filled up with."""
        return self.hidden.new_empty(rows, self.hidden.shape[1], len(self.weight))

    def _chunks(self, group: Group) -> Iterator[slice]:
        """Row chunks of a group: of whole units, or of rows of one unit."""
        units = self.chunk_rows // group.rows_per_unit
        for first in range(group.rows.start, group.rows.stop, max(1, units) * group.rows_per_unit):
            last = min(first + max(1, units) * group.rows_per_unit, group.rows.stop)
            step = last - first if units else self.chunk_rows
            for start in range(first, last, step):
                yield slice(start, min(start + step, last))

    def _unit_gradients(self, tape: Tape, head: Any, number: int) -> torch.Tensor:
        """The weight's gradients, [units of the group, V, d]."""
        group = tape.groups[number]
        held = self.losses.new_zeros(group.size, self.width, self.weight.shape[1])
        for rows in self._chunks(group):
            gradient = self._recorded(tape, head, number, rows)
            first = (rows.start - group.rows.start) // group.rows_per_unit
            count = max(1, (rows.stop - rows.start) // group.rows_per_unit)
            products = batched_outer(
                gradient.reshape(count, -1, gradient.shape[-1]),
                self.weighted(rows).reshape(count, -1, self.hidden.shape[-1]),
            )
            held[first : first + count] += products
        return held

    def _recorded(
        self, tape: Tape, head: Any, number: int, rows: slice, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits' gradient of a chunk; the bias's part of it goes to the tape at once."""
        gradient = self.logit_gradient(rows, out)
        if tape.wants(head.bias):
            group = tape.groups[number]
            per_row = torch.einsum("rnv,r->rv", gradient.to(self.losses.dtype), self.coefficients[rows])
            unit = torch.arange(rows.start - group.rows.start, rows.stop - group.rows.start) // group.rows_per_unit
            biases = per_row.new_zeros(group.size, per_row.shape[1])
            tape.at(number, head.bias).add_held(biases.index_add_(0, unit.to(biases.device), per_row))
        return gradient
