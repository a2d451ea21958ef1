"""The task: points around ten centres, a linear classifier, and its training. Plain numpy, no word of privacy."""

import numpy as np

CLASSES, FEATURES = 10, 16
CENTRES = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))


def load_data(partition_id: int, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A node's own points and their classes: (float64 [size, FEATURES], int64 [size])."""
    rng = np.random.default_rng(1000 + partition_id)
    classes = rng.integers(CLASSES, size=size)
    return CENTRES[classes] + rng.normal(size=(size, FEATURES)), classes


def first_weights() -> list[np.ndarray]:
    """Weights [FEATURES, CLASSES] and biases [CLASSES]."""
    return [np.zeros((FEATURES, CLASSES)), np.zeros(CLASSES)]


def train(weights: list[np.ndarray], points: np.ndarray, classes: np.ndarray, epochs: int, rate: float) -> None:
    """Some steps of gradient descent on the cross-entropy, in place."""
    for _ in range(epochs):
        scores = points @ weights[0] + weights[1]
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        shares[np.arange(len(classes)), classes] -= 1
        weights[0] -= rate * points.T @ shares / len(classes)
        weights[1] -= rate * shares.mean(axis=0)


def accuracy(weights: list[np.ndarray], points: np.ndarray, classes: np.ndarray) -> float:
    """Share of points whose class is found."""
    return float(((points @ weights[0] + weights[1]).argmax(axis=1) == classes).mean())
