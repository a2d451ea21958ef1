"""Pre-training of the default model on public text: minutes of one core, the same weights on any number of threads."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from fedsim.gradients.objective import CausalLanguageModel
from fedsim.models.config import SmallModelConfig
from fedsim.randomness import stream
from fedsim.rows import IGNORED_LABEL, TokenRows
from fedsim.terminal import shown

MICRO_BATCH_ROWS = 4
"""Rows whose logits still fit the caches of one core. Fixed, because it decides the order of summation."""

WARM_UP = 0.05
FINAL_RATE = 0.05
MATRIX_RATE = 2.0
"""Learning rate of the orthogonalised updates over that of AdamW."""
WEIGHT_DECAY = 0.01
SHOWN_AS = "Pre-training the default model (once)"


def pack_rows(texts: Sequence[Sequence[int]], context: int, separator: int, seed: int) -> TokenRows:
    """Tokenised texts in a random order, joined end to end and cut into rows of context tokens.

    Args:
        texts: Token ids of each text.
        context: Tokens in a row.
        separator: The end-of-text token; it stands before every text.
        seed: Seed of the order.

    Returns:
        Rows of context tokens, the last filled up with separators that are not scored.
    """
    order = stream(seed, "pretraining-rows").permutation(len(texts))
    joined = np.fromiter((token for place in order for token in (separator, *texts[place])), dtype=np.int64)
    count = -(-len(joined) // context)
    tokens = np.full(count * context, separator, dtype=np.int64)
    labels = np.full(count * context, IGNORED_LABEL, dtype=np.int64)
    tokens[: len(joined)] = labels[: len(joined)] = joined
    return TokenRows(tokens=tokens, offsets=np.arange(count + 1, dtype=np.int64) * context, labels=labels)


def pretrain(
    model: torch.nn.Module,
    rows: TokenRows,
    config: SmallModelConfig,
    *,
    seed: int,
    threads: int,
    progress: bool = True,
) -> list[float]:
    """Train a causal language model in place.

    Matrices inside the blocks follow Muon (momentum whose update is orthogonalised; Jordan et al. 2024), embeddings
    and vectors AdamW. Each micro-batch is computed by one thread and the gradients are added in a fixed order, so the
    weights do not depend on the number of threads, and a core that another process takes slows only its own part.

    Args:
        model: On the CPU, float32, without dropout.
        rows: Equally long rows, at least one.
        config: Steps, rows a step, learning rate.
        seed: Seed of the order of rows.
        threads: Micro-batches computed at the same time.
        progress: Show a progress bar.

    Returns:
        Mean training loss of each step, nats per token.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, config)
    objective = CausalLanguageModel()

    def gradients(indices: np.ndarray) -> tuple[float, int, tuple[torch.Tensor, ...]]:
        losses = objective.row_losses(model, objective.collate(rows, indices, "cpu"))
        total = losses.loss_sum.sum()
        return total.item(), int(losses.label_count.sum()), torch.autograd.grad(total, parameters)

    history = []
    batches = _batches(len(rows), config.batch_rows, config.steps, seed)
    pool = ThreadPoolExecutor(threads, "pretrain", torch.set_num_threads, (1,))
    with _one_thread_per_operation(), pool, shown(progress) as report:
        for step, batch in enumerate(batches):
            report(SHOWN_AS, step, len(batches))
            places = range(MICRO_BATCH_ROWS, len(batch), MICRO_BATCH_ROWS)
            parts = list(pool.map(gradients, np.split(batch, places)))
            count = sum(labels for _, labels, _ in parts)
            for parameter, *grads in zip(parameters, *(grads for _, _, grads in parts), strict=True):
                parameter.grad = sum(grads) / count
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * _rate(step, config.steps)
                optimizer.step()
            history.append(sum(loss for loss, _, _ in parts) / count)
        report(SHOWN_AS, len(batches), len(batches))
    model.zero_grad(set_to_none=True)
    return history


def _optimizers(model: torch.nn.Module, config: SmallModelConfig) -> list[torch.optim.Optimizer]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for parameter in model.parameters():
        (matrices if parameter.ndim == 2 and id(parameter) not in embeddings else rest).append(parameter)
    rate = config.learning_rate
    muon = torch.optim.Muon(matrices, lr=MATRIX_RATE * rate, weight_decay=WEIGHT_DECAY)
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [muon, adamw]


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear warm-up, then half a cosine down to FINAL_RATE."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


def _batches(rows: int, batch_rows: int, steps: int, seed: int) -> list[np.ndarray]:
    """Indices of the rows of each step: every row once before any row again."""
    epochs = range(math.ceil(steps * batch_rows / rows))
    order = np.array([stream(seed, "pretraining-order", epoch).permutation(rows) for epoch in epochs]).ravel()
    return list(order[: steps * batch_rows].reshape(steps, batch_rows))


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Parallel over micro-batches instead: threads that meet after every small matrix cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
