"""Modules and objectives of somebody's own."""

import torch
from torch import nn

from fedsim import Batch, CausalLanguageModel, RowLosses


class Recurrent(nn.Module):
    """A language model that knows nothing of transformers."""

    def __init__(self, words: int, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.words(input_ids))[0])


class Pooled(nn.Module):
    """A classifier that means over the real tokens."""

    def __init__(self, words: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(words, width), nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        real = attention_mask[..., None].float()
        return self.head((self.words(input_ids) * real).sum(1) / real.sum(1))


class Smoothed(CausalLanguageModel):
    """Cross-entropy with smoothed labels."""

    def row_losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        logits = model(batch.input_ids)[:, :-1]
        scored = batch.labels >= 0
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.labels.clamp(min=0), reduction="none", label_smoothing=0.1
        )
        correct = (logits.argmax(-1) == batch.labels) & scored
        return RowLosses(loss_sum=(losses * scored).sum(1), label_count=scored.sum(1), correct=correct.sum(1))


class MeanOverBatch(Smoothed):
    """Takes from each row the mean of the batch: a row's loss depends on its company."""

    def row_losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        found = super().row_losses(model, batch)
        shifted = found.loss_sum - found.loss_sum.mean() / 2
        return RowLosses(loss_sum=shifted, label_count=found.label_count, correct=found.correct)


class ScoresPadding(Smoothed):
    """Scores what is behind a row's end too."""

    def row_losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        found = super().row_losses(model, batch)
        longer = found.loss_sum + 0.1 * batch.input_ids.shape[1]
        return RowLosses(loss_sum=longer, label_count=found.label_count, correct=found.correct)


class AddsEarlierRows(Smoothed):
    """Adds to each row's loss those of the rows before it: the first of a batch notices nothing."""

    def row_losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        found = super().row_losses(model, batch)
        return RowLosses(loss_sum=found.loss_sum.cumsum(0), label_count=found.label_count, correct=found.correct)


class Remembering(Recurrent):
    """Keeps, in a buffer that is saved with it, the sum of all that it reads."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen += self.words(input_ids).detach().sum((0, 1))
        return super().forward(input_ids)


class Configured(Recurrent):
    """Has a configuration that is none of transformers."""

    def __init__(self, words: int, config: object) -> None:
        super().__init__(words)
        self.config = config


class Scaled(nn.Module):
    """A second head behind another model's, of whose name its own is a part."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.inner, self.head = Recurrent(words), nn.Linear(words, words)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(input_ids))
