"""Whether a model's rows keep to themselves, tried out: nobody's contribution may depend on who shares a batch.

Rows are padded to the longest of their micro-batch. A causal language model never looks ahead and is handed no mask; a
classifier is handed one and must honour it. A model that does neither takes the padding, and so the company, for part
of the text: removing one user would then move the contributions of others, and no clip bounds that.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedsim.errors import InvalidInput
from fedsim.gradients.model import exact_products, model_device
from fedsim.gradients.objective import Objective
from fedsim.models.config import ModelConfig
from fedsim.rows import TokenRows, with_prompts

TOKENS = 8
"""Real tokens of the row that is looked at; padded to twice as many."""

TOLERANCE = 1e-4
"""How far a logit may move, relatively to how far other tokens in its own row move it. In float32, models of 40
families that keep rows apart moved by 2·10⁻⁷ at most, encoders by 9·10⁻⁴ at least though drawn at random."""

HALF_SAME_SHAPE = 1e-3
"""The same in bfloat16 between batches of one shape, of which a causal model computes each row in the same way (it
moved by exactly 0). What moves more is computed again in float32."""

HALF_OTHER_SHAPE = 2e-2
"""The same in bfloat16 between batches of different lengths, where matrix products round differently: by 2·10⁻³."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    """How far a row's outputs move relatively to how far its own tokens move them.

    Attributes:
        later: When the tokens behind it are other ones; 0 for a classifier, whose mask hides them.
        neighbour: When the row beside it is another one.
        padding: When it is not padded.
    """

    later: float
    neighbour: float
    padding: float


def require_independent_rows(
    model: Any,
    config: ModelConfig,
    pad_token: int,
    end_token: int | None,
    context: int | None,
    *,
    ends_once: bool = False,
) -> None:
    """Refuse a model of whose rows one depends on another, on its length, or (a language model) on later tokens.

    Three forward passes over 2 · 16, 2 · 16 and 8 tokens, a fourth where something moved, and a forward and backward
    pass over 8 tokens, whose gradients are dropped. A classifier's rows end with the end token, but for one with two
    of it and one with none, unless every row is given exactly one: some read their answer at the end tokens of all
    rows together.

    Args:
        model: As it will be trained, on its device and in evaluation mode.
        config: What was asked for.
        pad_token: Fills rows up.
        end_token: Ends a text, where the tokenizer has such a token: some classifiers read their answer there.
        context: Most tokens that the model can read, if there is a limit.
        ends_once: Whether the objective sees to it that a row has the end token at its end and nowhere else.

    Raises:
        InvalidInput: It is such a model, or it fails on rows of random tokens.
    """
    length = TOKENS if context is None else max(1, min(TOKENS, context // 2))
    device = model_device(model)
    halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    try:
        causal = config.task != "sequence-classification"
        rows = _Rows(model, causal, length, pad_token, end_token, ends_once, device)
        with torch.no_grad(), exact_products(device):
            moves = rows.moves(HALF_SAME_SHAPE if halves else TOLERANCE)
            if halves and max(moves.later, moves.neighbour) > HALF_SAME_SHAPE:
                with _in_float32(model):
                    moves, halves = rows.moves(TOLERANCE), False
        with exact_products(device):
            rows.try_backward()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"Trying it on rows of random tokens said: {reason}"
        raise InvalidInput("model.path", config.path, _allowed(config), hint) from error
    _judge(moves, config, *((HALF_SAME_SHAPE, HALF_OTHER_SHAPE) if halves else (TOLERANCE, TOLERANCE)))


def _judge(moves: Moves, config: ModelConfig, same_shape: float, other_shape: float) -> None:
    """Refuse what moved further than it may, and say what moved it."""
    if any(math.isnan(move) for move in (moves.later, moves.neighbour, moves.padding)):
        reason = "What it makes of random tokens is not finite."
    elif moves.neighbour > same_shape:
        reason = "What it makes of a row moves with the row beside it: with a router of limited capacity, say."
    elif moves.later > same_shape:
        reason = (
            "Its logits move with tokens behind them: it reads in both directions, and so would read the padding, "
            "which depends on who else is in a batch. Such an encoder is for classification: set model.task to "
            "sequence-classification, or choose a model that reads from left to right."
        )
    elif moves.padding > other_shape:
        reason = (
            "What it makes of a row moves with how far the row is padded, which depends on who else is in a batch."
        )
    else:
        return
    raise InvalidInput("model.path", config.path, _allowed(config), reason)


def _allowed(config: ModelConfig) -> str:
    if config.task != "sequence-classification":
        return "a language model whose logits depend on the tokens before them in their own row alone"
    return "a classifier whose logits depend on the unmasked tokens of their own row alone"


class _Rows:
    """Rows of random tokens, and what a model makes of one of them in different company.

    That one is the last: where a batch's tokens are served in their order, the last ones go short.

    Args:
        model: The model.
        causal: Whether it is a language model, looked at in every position. It is handed no mask, but an encoder is,
            beside a decoder that reads the same row.
        length: Tokens of the row that is looked at; its neighbour has twice as many.
        pad_token, end_token, ends_once: As for `require_independent_rows`.
        device: Of the model.
    """

    def __init__(
        self,
        model: Any,
        causal: bool,
        length: int,
        pad_token: int,
        end_token: int | None,
        ends_once: bool,
        device: torch.device,
    ) -> None:
        self.model, self.causal, self.length, self.device = model, causal, length, device
        own = getattr(getattr(model, "config", None), "eos_token_id", None)
        ends = {end_token, *(own if isinstance(own, (list, tuple)) else (own,))} - {None}
        special = {pad_token, *ends}
        vocabulary = min(int(model.get_input_embeddings().weight.shape[0]), 2**15)
        usual = torch.tensor([token for token in range(vocabulary) if token not in special] or [0])
        generator = torch.Generator().manual_seed(0)

        def row(tokens: int) -> torch.Tensor:
            drawn = usual[torch.randint(0, len(usual), (tokens,), generator=generator)]
            if end_token is not None and not causal:
                drawn[-1] = end_token
            return drawn

        self.row, self.tail, self.neighbours = row(length), row(length), [row(2 * length), row(2 * length)]
        if ends and not causal and not ends_once:
            twice, never = self.neighbours
            for place, end in enumerate(sorted(ends)):
                twice[place % (2 * length - 1)] = end
            never[-1] = usual[0]
        self.padding = torch.full((length,), pad_token)

    def moves(self, limit: float) -> Moves:
        """How far the row's outputs move; what moved them is looked for where they move further than limit."""
        padded, other = torch.cat([self.row, self.padding]), torch.cat([self.row, self.tail])
        first = self._read([self.neighbours[0], padded])
        alone = self._read([self.row])
        padding = _apart(first, alone)
        both = _apart(first, self._read([self.neighbours[1], other if self.causal else padded]))
        if not self.causal or both <= limit:
            return Moves(later=both if self.causal else 0.0, neighbour=both, padding=padding)
        later = _apart(first, self._read([self.neighbours[0], other]))
        neighbour = _apart(first, self._read([self.neighbours[1], padded]))
        return Moves(later=later, neighbour=neighbour, padding=padding)

    def try_backward(self) -> None:
        """One backward pass, which some models refuse in evaluation mode; no gradient stays behind."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with torch.enable_grad():
            outputs = self._read([self.row])
            torch.autograd.grad(outputs[0].sum(), parameters, allow_unused=True)

    def _read(self, rows: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The logits; of a classifier also the last hidden states, where it tells them.

        What reaches its other positions may reach the one it answers from only weakly in a model drawn at random.
        """
        input_ids = torch.stack(rows).to(self.device)
        arguments: dict[str, Any] = {"use_cache": False} if self.causal else {}
        encodes = self.causal and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if encodes:
            arguments["decoder_input_ids"] = input_ids
        if encodes or not self.causal:
            mask = torch.ones_like(input_ids)
            if len(rows[-1]) > self.length:
                mask[-1, self.length :] = 0
            arguments["attention_mask"] = mask
        output = self.model(input_ids, output_hidden_states=not self.causal, **arguments)
        hidden = getattr(output, "hidden_states", None)
        found = (output.logits,) if not hidden else (output.logits, hidden[-1])
        return tuple(self._of_the_row(tensor, input_ids.shape) for tensor in found)

    def _of_the_row(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """[rows, …] cut to the positions that the row looked at has, where there are positions."""
        if tensor.ndim > 2 and tensor.shape[1] == shape[1]:
            tensor = tensor[:, : self.length]
        return tensor.double()


def _apart(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    """How far the last row of one is from that of the other, in units of how far apart the two rows of one are."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape[1:] != b.shape[1:]:
            continue  # pooled over positions: the logits tell
        moved, seen = float((a[-1] - b[-1]).norm()), float((a[-1] - a[0]).norm())
        relative = moved / seen if seen else moved
        if math.isnan(relative):
            return relative
        worst = max(worst, relative)
    return worst


@contextmanager
def _in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model's halved parameters are float32; then they are what they were, bit by bit."""
    kept = {p: p.data for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    try:
        for parameter, data in kept.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def require_losses_apart(
    model: torch.nn.Module, objective: Objective, config: ModelConfig, vocabulary: int, context: int | None
) -> None:
    """Refuse an objective of somebody's own where a row's loss moves with the rows beside it, or with its padding.

    Five forward passes over a row of random tokens: alone, and before and behind two rows that are twice as long. A
    module that keeps something of what it reads in a buffer is refused too: neither clip nor noise is for that.

    Args:
        model: As it will be trained, on its device and in evaluation mode.
        objective: What it is trained by.
        config: What was asked for.
        vocabulary: Tokens that there are.
        context: Most tokens that the model can read, if there is a limit.

    Raises:
        InvalidInput: It is such an objective or model, or it fails on rows of random tokens.
    """
    allowed = "an objective and a model that give each row a finite loss, which depends on that row alone"
    length = TOKENS if context is None else max(1, min(TOKENS, context // 2))
    rows = TokenRows(
        tokens=np.random.default_rng(0).integers(0, vocabulary, 5 * length),
        offsets=np.array([0, length, 3 * length, 5 * length]),
        classes=np.zeros(3, np.int64) if config.task == "sequence-classification" else None,
    )
    rows = with_prompts(rows) if config.reads_apart else rows
    device = model_device(model)
    try:
        with torch.no_grad(), exact_products(device):
            losses, counts = [], []
            kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
            for company in ([0], [0, 1], [0, 2], [1, 0], [2, 0]):
                found = objective.row_losses(model, objective.collate(rows, np.array(company), device))
                losses.append(float(found.loss_sum[company.index(0)]))
                counts.append(int(found.label_count[company.index(0)]))
            changed = _changed(model, kept)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever somebody's own code raises
        said = str(error).strip().splitlines()
        hint = f"Trying it on rows of random tokens said: {type(error).__name__}: {said[0] if said else ''}"
        raise InvalidInput("objective", type(objective).__name__, allowed, hint) from error
    if changed:
        hint = (
            f"Its forward pass changes the buffer {changed[0]}: what was read would leave with the model, unprotected."
        )
        raise InvalidInput("model", type(model).__name__, "a module that keeps nothing of what it reads", hint)
    if counts != [int(objective.label_counts(rows)[0])] * len(counts):
        hint = f"Its label_counts says {objective.label_counts(rows)[0]} of a row, its row_losses {counts}."
        raise InvalidInput("objective", type(objective).__name__, allowed, hint)
    scale = max(map(abs, losses))
    if not (math.isfinite(scale) and max(losses) - min(losses) <= TOLERANCE * scale):
        hint = (
            f"Of one row of random tokens it makes {losses[0]:g} alone, "
            f"{', '.join(f'{loss:g}' for loss in losses[1:])} beside others."
        )
        raise InvalidInput("objective", type(objective).__name__, allowed, hint)


def _changed(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> list[str]:
    """Buffers that are no longer what they were; those that grow with a row's length, and are not saved, may be."""
    now, saved = dict(model.named_buffers()), set(model.state_dict())
    return [
        name
        for name, buffer in now.items()
        if (name in saved or (name in kept and kept[name].shape == buffer.shape))
        and not (name in kept and torch.equal(kept[name], buffer))
    ]
