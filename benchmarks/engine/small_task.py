"""The task that fedsim and pfl-research both train: pfl-research's language-model benchmark, on synthetic users.

What is that benchmark's own (`benchmarks/lm/configs/baseline.yaml` with `--central_privacy_mechanism`, StackOverflow):
a transformer of three layers after which the normalisations come, 96 wide, 8 heads, feed-forward layers of 1,536,
ReLU, one table of 10,004 words for input and output; sentences of 20 words; one local epoch of gradient descent in
batches of 16 sentences with learning rate 0.3; users weigh the same; updates clipped to an L2 norm of 1; the noise of
a cohort of 5,000 scaled down; Adam with learning rate 0.1, ε = 0.01, β = (0.9, 0.99) at the server.

What differs: the users, who are made up; at most 16 sentences of each (there 64), so that the local epoch is one step
(fedsim's local steps are on all of a user's rows); a smaller cohort (there 400); no dropout (there 0.1; a clipped sum
must be repeatable); positions are learnt (there fixed), and words are not multiplied by √96. The noise multiplier is
a plain number (there it is worked out once), and no user is evaluated.

Needs torch and numpy alone, so that either side's environment can import it. pfl-research trains the module of this
file, which is as lean as its own; fedsim trains the same function as a Hugging Face model, as its users do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

PAD = 0
"""The word that fills sentences; no sentence has it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of the task."""

    users: int = 1000
    cohort: int = 100
    most_sentences: int = 16
    """Of a user. 16 is a local batch of the benchmark."""
    vocabulary: int = 10_004
    width: int = 96
    heads: int = 8
    feed_forward: int = 1536
    layers: int = 3
    length: int = 20
    """Words of a sentence that are given, and as many predicted; longer ones end there."""
    local_learning_rate: float = 0.3
    clip_norm: float = 1.0
    noise_multiplier: float = 0.08
    """Of a sum over the cohort."""
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 0.01


class Block(torch.nn.Module):
    """A transformer block whose normalisations come last."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.heads = task.heads
        self.attention_in = torch.nn.Linear(task.width, 3 * task.width)
        self.attention_out = torch.nn.Linear(task.width, task.width)
        self.after_attention = torch.nn.LayerNorm(task.width)
        self.mlp_in = torch.nn.Linear(task.width, task.feed_forward)
        self.mlp_out = torch.nn.Linear(task.feed_forward, task.width)
        self.after_mlp = torch.nn.LayerNorm(task.width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows, length, width = states.shape
        heads = self.attention_in(states).view(rows, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = self.after_attention(states + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, width)))
        return self.after_mlp(states + self.mlp_out(relu(self.mlp_in(states))))


class SmallLanguageModel(torch.nn.Module):
    """Logits of the next word from words [R, T]; one table for words that are given and predicted."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(task.vocabulary, task.width)
        self.positions = torch.nn.Embedding(task.length + 1, task.width)
        self.blocks = torch.nn.ModuleList(Block(task) for _ in range(task.layers))
        torch.nn.init.uniform_(self.words.weight, -0.05, 0.05)
        torch.nn.init.uniform_(self.positions.weight, -0.05, 0.05)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        states = self.words(words) + self.positions.weight[: words.shape[1]]
        for block in self.blocks:
            states = block(states)
        return states @ self.words.weight.t()

    def loss(self, sentences: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the predicted words of sentences [R, length + 1]: what pfl-research asks for."""
        logits = self(sentences[:, :-1])
        return cross_entropy(logits.flatten(0, 1), sentences[:, 1:].flatten(), ignore_index=PAD)

    def metrics(self, sentences: torch.Tensor) -> dict:
        """pfl-research wants the method; nothing is measured."""
        return {}


def make_model(task: Task) -> SmallLanguageModel:
    """The same initial weights on both sides."""
    torch.manual_seed(0)
    return SmallLanguageModel(task)


def make_users(task: Task) -> list[list[np.ndarray]]:
    """Each user's sentences, int64 of 5 to length + 1 words; few users have few."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(1 + rng.geometric(1 / task.most_sentences, size=task.users), task.most_sentences)
    lengths = np.clip(rng.poisson(13, size=int(sizes.sum())) + 1, 5, task.length + 1)
    words = 1 + rng.zipf(1.3, size=int(lengths.sum())) % (task.vocabulary - 1)
    sentences = np.split(words.astype(np.int64), np.cumsum(lengths)[:-1])
    ends = np.cumsum(sizes)
    return [sentences[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def padded(sentences: list[np.ndarray], task: Task) -> np.ndarray:
    """A user's sentences as that benchmark keeps them: int64 [sentences, length + 1], filled up with PAD."""
    filled = np.full((len(sentences), task.length + 1), PAD, dtype=np.int64)
    for row, sentence in zip(filled, sentences, strict=True):
        row[: len(sentence)] = sentence
    return filled
