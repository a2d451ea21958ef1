"""How a client computes, as its run's configuration says."""

from dataclasses import dataclass
from typing import Literal, Self

from fedsim.config import RunConfig
from fedsim.engine.exact import MICRO_BATCH_TOKENS


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How a worker computes, which changes nothing but rounding.

    Attributes:
        gradients: "fast" or "reference".
        autocast: Whether the model runs in bfloat16; None: on a GPU.
        compiled: Whether its passes are compiled; None: as `clipped_sum` chooses.
        exact: Whether sums are exact, so that every worker must compute the same bits, whatever its memory.
        threads: CPU threads, which are fixed where sums are exact.
        max_tokens: Tokens of a micro-batch; None chooses by device and model, or where sums are exact
            MICRO_BATCH_TOKENS.
        row_tokens: Tokens of the longest row.
    """

    gradients: Literal["fast", "reference"] = "fast"
    autocast: bool | None = False
    compiled: bool | None = None
    exact: bool = False
    threads: int = 1
    max_tokens: int | None = None
    row_tokens: int = 64

    @classmethod
    def of(cls, config: RunConfig, row_tokens: int) -> Self:
        """As a run's configuration says, over rows of at most so many tokens."""
        engine = config.engine
        return cls(
            gradients=config.gradients,
            autocast={"auto": None, "float32": False, "bfloat16": True}[engine.precision],
            compiled=False if config.model.checkpointing else {"auto": None, "on": True, "off": False}[engine.compile],
            exact=engine.exact,
            threads=engine.cpus_per_worker,
            max_tokens=engine.max_tokens or None,
            row_tokens=row_tokens,
        )

    @property
    def micro_batch(self) -> int | None:
        """Tokens of a micro-batch to begin with; None where the device's free memory decides."""
        return self.max_tokens or (MICRO_BATCH_TOKENS if self.exact else None)
