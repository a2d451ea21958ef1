"""The matrix products that the small task's gradient cannot do without, timed alone: float32 in torch takes no less.

Each weight meets a token in three products: forward, the gradient of what it was given, and its own. Attention,
softmax, normalisations, clipping, the server and all else cost nothing here, padding is left out, and each product is
taken at the number of tokens at which it is quickest.
"""

import time

import torch

from benchmarks.engine.small_task import Task, make_users

TOKENS_AT_ONCE = (64, 128, 256, 1024)
REPEATS = 9


def seconds_per_user(task: Task) -> float:
    """Processor seconds of one thread for a user of average length."""
    predicted = sum(len(sentence) - 1 for user in make_users(task) for sentence in user)
    return predicted / task.users * sum(times * _seconds_per_token(*shape) for shape, times in _weights(task).items())


def _weights(task: Task) -> dict[tuple[int, int], int]:
    """Rows and columns of the weights, and how many there are."""
    width = task.width
    return {
        (3 * width, width): task.layers,
        (width, width): task.layers,
        (task.feed_forward, width): task.layers,
        (width, task.feed_forward): task.layers,
        (task.vocabulary, width): 1,
    }


def _seconds_per_token(rows: int, columns: int) -> float:
    least = [float("inf")] * 3
    weight, weight_gradient = torch.randn(rows, columns), torch.empty(rows, columns)
    for tokens in TOKENS_AT_ONCE:
        given, returned = torch.randn(tokens, columns), torch.empty(tokens, rows)
        products = (
            (given, weight.t(), returned),
            (returned, weight, given),
            (returned.t(), given, weight_gradient),
        )
        least = [min(least[i], _seconds(*product) / tokens) for i, product in enumerate(products)]
    return sum(least)


def _seconds(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> float:
    found = []
    for _ in range(REPEATS):
        out.zero_()  # in the caches; and no factor grows from product to product
        began = time.process_time()
        torch.mm(left, right, out=out)
        found.append(time.process_time() - began)
    return min(found)
