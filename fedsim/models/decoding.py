"""How text is generated: plain data, importing it needs no torch."""

from dataclasses import dataclass

from fedsim.errors import InvalidInput
from fedsim.validation import require_at_least, require_probability

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen, with the names that others give these options.

    Attributes:
        max_new_tokens: Most tokens after the prompt.
        temperature: Logits are divided by it; 0 takes the likeliest token each time.
        top_p: Choose among the likeliest tokens that have this probability together.
        top_k: Choose among so many of the likeliest tokens; 0 for all.
        number: Continuations of each prompt.
        seed: Seed of the choices; None draws others each time.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    number: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        require_at_least("max-new-tokens", self.max_new_tokens, 1)
        require_at_least("temperature", self.temperature, 0)
        require_probability("top-p", self.top_p)
        require_at_least("top-k", self.top_k, 0)
        require_at_least("number", self.number, 1)
        if not self.temperature and self.number > 1:
            hint = "The likeliest tokens are the same each time."
            raise InvalidInput("number", self.number, "1 with --temperature 0", hint)
