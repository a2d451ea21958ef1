"""Which way each layer's gradients take, many units at once or one by one, and what workers say of it."""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

Way = Literal["fast", "redone", "loop"]
"""Of a layer: in one pass for all units, run again for each unit, or with the whole model for each unit."""
SLOWER = "about 1.5 to 3 times slower on a CPU (docs/gradients.md), more on a GPU"
"""What one unit after the other costs, as measured there."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Layers of one kind at like places, whose gradients take the same way.

    Attributes:
        name: Theirs within the model, with * for numbers.
        kind: Of layer.
        way: Which way.
        count: How many.
    """

    name: str
    kind: str
    way: Way
    count: int


@dataclass(frozen=True, kw_only=True)
class GradientPaths:
    """How a model's clipped gradients are computed. Nothing in it is of the rows: names, kinds and causes alone.

    Attributes:
        layers: Those with trainable parameters.
        because: Why one unit comes after the other; empty where many share a pass.
        packed: Whether rows that share a pass lie end to end, without padding.
    """

    layers: tuple[Layers, ...]
    because: str = ""
    packed: bool = False

    @classmethod
    def of(cls, kinds: Mapping[str, str], redone: set[str], because: str = "", packed: bool = False) -> Self:
        """Of layers' kinds by name, and those among them that are run again for each unit."""
        found: Counter[tuple[str, str, Way]] = Counter()
        for name, kind in kinds.items():
            way: Way = "loop" if because else "redone" if name in redone else "fast"
            found[NUMBER.sub("*", f".{name}.")[1:-1], kind, way] += 1
        layers = [Layers(name=n, kind=kind, way=way, count=count) for (n, kind, way), count in found.items()]
        return cls(layers=tuple(layers), because=because, packed=packed)

    @property
    def wholly_fast(self) -> bool:
        """Whether every layer is."""
        return all(layers.way == "fast" for layers in self.layers)

    def in_words(self) -> str:
        """One line."""
        total = sum(layers.count for layers in self.layers)
        if self.because:
            return f"Gradients: unit after unit, because {self.because}; {SLOWER}"
        if self.wholly_fast:
            return f"Gradients: all {total} layers fast"
        redone = [layers for layers in self.layers if layers.way == "redone"]
        names = ", ".join(f"{layers.name} ({layers.kind})" for layers in redone)
        count = sum(layers.count for layers in redone)
        return f"Gradients: {total - count} of {total} layers fast, {count} redone for each unit: {names}"

    def to_json(self) -> str:
        """As text, for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    @functools.lru_cache(maxsize=64)
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote: read once, for all workers of a run say the same in every round.

        Raises:
            ValueError, KeyError, TypeError: It is something else.
        """
        values: dict[str, Any] = json.loads(text)
        layers = tuple(Layers(**one) for one in values["layers"])
        return cls(layers=layers, because=str(values["because"]), packed=bool(values["packed"]))


class PathsHeard:
    """What workers said of their ways: said on the terminal once, and again where one differs or changes.

    Args:
        say: Says a line.
        keep: Keeps what is known by now, as JSON can hold it.
    """

    def __init__(self, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> None:
        self._say, self._keep = say, keep
        self._of: dict[int, GradientPaths] = {}

    def hear(self, worker: int, text: str) -> None:
        """Take a worker's word, `GradientPaths.to_json`; empty where it has none yet."""
        if not text:
            return
        paths, before = GradientPaths.from_json(text), self._of.get(worker)
        if paths == before:
            return
        known = paths in self._of.values()
        first = not self._of
        self._of[worker] = paths
        if first:
            self._say(paths.in_words())
        elif before is not None:
            self._say(f"{paths.in_words()} (worker {worker} by now)")
        elif not known:
            self._say(f"{paths.in_words()} (worker {worker})")
        self._keep(self.to_values())

    @property
    def in_words(self) -> list[str]:
        """A line for each way that some worker takes; none before the first was heard."""
        return [paths.in_words() for paths in dict.fromkeys(self._of.values())]

    def to_values(self) -> dict[str, Any]:
        """Each way, and how many workers take it."""
        workers = Counter(self._of.values())
        ways = [
            {"in_words": paths.in_words(), "workers": count, **dataclasses.asdict(paths)}
            for paths, count in workers.items()
        ]
        return {"gradients": ways}
