"""The special tokens around a row and its parts, which stay whole however long its text is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a tokenizer puts around a text, or around a prompt and a text.

    Attributes:
        before: Before the prompt, or before the text where there is none ([CLS], <s>).
        between: Between a prompt and its text; the end of the prompt where a text stands apart from it.
        opening: Before a text that stands apart from its prompt, in a decoder.
        after: Behind the text ([SEP], </s>).
    """

    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.opening) + len(self.after)


BARE = Frame()
"""No special tokens."""
