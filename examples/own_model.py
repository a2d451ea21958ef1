"""A model and a loss of your own: a recurrent network over letters, trained with label smoothing.

    python examples/own_model.py

Any torch module will do whose rows keep to themselves. Layers that fedsim knows get fast clipped gradients; others, as
the recurrent one here, are computed unit by unit, with the same result.
"""

import string

import torch
from own_text import made_up
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from fedsim import Batch, CausalLanguageModel, RowLosses, fine_tune

LETTERS = ["<end>", *string.ascii_letters, *string.digits, *string.punctuation, " "]


class Recurrent(nn.Module):
    """Letters to logits of the letter that follows."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.memory = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.letters(input_ids))[0])


class Smoothed(CausalLanguageModel):
    """Cross-entropy with smoothed labels. A row's loss must depend on that row alone: fedsim tries it out."""

    def row_losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        logits = model(batch.input_ids)[:, :-1]
        scored = batch.labels >= 0
        target = batch.labels.clamp(min=0)
        losses = nn.functional.cross_entropy(logits.mT, target, reduction="none", label_smoothing=0.05) * scored
        correct = (logits.argmax(-1) == batch.labels) & scored
        return RowLosses(loss_sum=losses.sum(1), label_count=scored.sum(1), correct=correct.sum(1))


def main() -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate(LETTERS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    common = {"tokenizer": tokenizer, "objective": Smoothed(), "delta": 1e-3, "gradients_per_round": 64}
    tuned = fine_tune(Recurrent(), made_up(), epsilon=8, rounds=6, learning_rate=1e-2, **common)
    print(tuned)
    print(f"a {type(tuned.model).__name__} with ε = {tuned.epsilon:.3f} at δ = {tuned.statement['delta']:g}")


if __name__ == "__main__":
    main()
