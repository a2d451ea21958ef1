"""Users whose updates are known: a store of rows with prescribed gradients, and the model that has them."""

import numpy as np
import torch

from fedsim.gradients import Batch, RowLosses
from fedsim.rows import TokenRows


def sizes_of(coordinates: int) -> dict[str, int]:
    """Two blocks of parameters, of unequal size, so that allocations of noise and clips by layer differ on them."""
    first = max(1, coordinates // 8)
    sizes = {"blocks.0.weight": first, "blocks.1.weight": coordinates - first}
    return {name: size for name, size in sizes.items() if size}


class CanaryUsers:
    """Users of one-token rows; a row's token says which prescribed gradient it has. Every split is all of them.

    Args:
        owned: Rows of each user, int [users].
        tokens: Each row's token, int [rows].
    """

    def __init__(self, owned: np.ndarray, tokens: np.ndarray) -> None:
        self.user_offsets = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)
        self.row_lengths = np.ones(len(tokens), dtype=np.int64)
        self._tokens = np.asarray(tokens, dtype=np.int64)

    @property
    def num_users(self) -> int:
        """Users."""
        return len(self.user_offsets) - 1

    @property
    def num_rows(self) -> int:
        """Rows of all of them."""
        return len(self._tokens)

    def take(self, row_indices: np.ndarray, /) -> TokenRows:
        """Rows by number."""
        offsets = np.arange(len(row_indices) + 1, dtype=np.int64)
        return TokenRows(tokens=self._tokens[row_indices], offsets=offsets)

    def split(self, name: str) -> "CanaryUsers":
        """All users, whatever the split's name."""
        return self


class PrescribedUpdates(torch.nn.Module):
    """A model whose gradient on a row with token t is updates[t]: linear maps of a fixed table.

    Args:
        updates: float32 [tokens, P].
    """

    def __init__(self, updates: np.ndarray) -> None:
        super().__init__()
        table = torch.from_numpy(np.ascontiguousarray(updates, dtype=np.float32))
        sizes = list(sizes_of(updates.shape[1]).values())
        for index, part in enumerate(torch.split(table, sizes, dim=1)):
            self.register_buffer(f"part_{index}", part.contiguous())
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(size, 1, bias=False) for size in sizes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [R] to losses [R]."""
        # One position a row: the fast path is of layers that are given rows of positions.
        parts = [getattr(self, f"part_{index}")[tokens][:, None] for index in range(len(self.blocks))]
        losses = [block(part)[:, 0, 0] for block, part in zip(self.blocks, parts, strict=True)]
        return torch.stack(losses).sum(dim=0)


class OwnBlocks(torch.nn.Module):
    """A model in which each token but 0 has parameters of its own in every block, with the same prescribed gradient.

    A million parameters take no more than that, for nothing holds every token's update; on token 0 it has no gradient.

    Args:
        tokens: Tokens that have parameters.
        update: The gradient on a token's own parameters, float32 [size], divided among the blocks as `sizes_of` says.
    """

    def __init__(self, tokens: int, update: np.ndarray) -> None:
        super().__init__()
        parts = torch.split(
            torch.from_numpy(np.asarray(update, dtype=np.float32)), list(sizes_of(len(update)).values())
        )
        for index, part in enumerate(parts):
            self.register_buffer(f"part_{index}", part.clone())
        self.blocks = torch.nn.ModuleList(torch.nn.Embedding(tokens, len(part)) for part in parts)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [R] to losses [R]."""
        place = (tokens - 1).clamp(min=0)[:, None]  # one position a row, as for the layers above
        losses = [block(place)[:, 0] @ self.get_buffer(f"part_{index}") for index, block in enumerate(self.blocks)]
        return (tokens > 0) * torch.stack(losses).sum(dim=0)

    @staticmethod
    def along(values: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Of values for each parameter, in the layout's order, each token's part along a direction, float64 [tokens].

        Args:
            values: float64 [tokens · size].
            direction: float64 [size].
        """
        tokens, found, start = len(values) // len(direction), 0.0, 0
        for part in np.split(direction, np.cumsum(list(sizes_of(len(direction)).values()))[:-1]):
            end = start + tokens * len(part)
            found, start = found + values[start:end].reshape(tokens, len(part)) @ part, end
        return np.asarray(found)


class PrescribedLoss:
    """The model's output is the loss, up to a factor; each row scores one label.

    Args:
        factor: What the output is multiplied by.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def label_counts(self, rows: TokenRows) -> np.ndarray:
        """One a row."""
        return np.ones(len(rows), dtype=np.int64)

    def collate(self, rows: TokenRows, indices: np.ndarray, device: torch.device | str, pad_token: int = 0) -> Batch:
        """The rows' tokens."""
        ids = torch.from_numpy(rows.tokens[rows.offsets[indices]]).to(device)[:, None]
        return Batch(input_ids=ids, attention_mask=None, labels=ids)

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> RowLosses:
        """What the model returns, times the factor."""
        ones = torch.ones(len(batch.input_ids), dtype=torch.int64, device=batch.input_ids.device)
        return RowLosses(loss_sum=self._factor * model(batch.input_ids[:, 0]), label_count=ones, correct=ones)
