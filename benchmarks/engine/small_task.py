"""The task that fedsim and pfl-research both train: a small language model on synthetic users.

Needs torch and numpy alone, so that either side's environment can import it. One gradient of all of a user's rows,
clipped; Gaussian noise; one step of gradient descent on the average.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

CLIP_NORM = 0.5
NOISE_MULTIPLIER = 0.3
LEARNING_RATE = 0.5


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of the task. The default is small enough that moving and book-keeping show beside computing."""

    users: int = 2000
    cohort: int = 200
    vocabulary: int = 1000
    width: int = 64
    layers: int = 2
    length: int = 32
    most_rows: int = 8


class Block(torch.nn.Module):
    """A pre-norm transformer block with four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention = torch.nn.LayerNorm(width)
        self.attention_in = torch.nn.Linear(width, 3 * width)
        self.attention_out = torch.nn.Linear(width, width)
        self.before_mlp = torch.nn.LayerNorm(width)
        self.mlp_in = torch.nn.Linear(width, 4 * width)
        self.mlp_out = torch.nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows, length, width = states.shape
        heads = self.attention_in(self.before_attention(states)).view(rows, length, 3, 4, width // 4)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, width))
        return states + self.mlp_out(torch.nn.functional.gelu(self.mlp_in(self.before_mlp(states))))


class SmallLanguageModel(torch.nn.Module):
    """Logits of the next token from token ids [R, T]; the head is tied to nothing."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(task.vocabulary, task.width)
        self.positions = torch.nn.Embedding(task.length, task.width)
        self.blocks = torch.nn.ModuleList(Block(task.width) for _ in range(task.layers))
        self.norm = torch.nn.LayerNorm(task.width)
        self.head = torch.nn.Linear(task.width, task.vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states = self.tokens(input_ids) + self.positions(places)
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states))

    def loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the predicted tokens: what pfl-research asks a model for."""
        logits = self(input_ids)[:, :-1]
        return cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    def metrics(self, input_ids: torch.Tensor) -> dict:
        """pfl-research wants the method; nothing is measured."""
        return {}


def make_model(task: Task) -> SmallLanguageModel:
    """The same initial weights on both sides."""
    torch.manual_seed(0)
    return SmallLanguageModel(task)


def make_users(task: Task) -> list[np.ndarray]:
    """Each user's rows, int64 [rows, length]; few users have many."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(1 + rng.geometric(0.4, size=task.users), task.most_rows)
    ranks = rng.zipf(1.3, size=(int(sizes.sum()), task.length)) % task.vocabulary
    return np.split(ranks.astype(np.int64), np.cumsum(sizes)[:-1])
