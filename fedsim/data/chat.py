"""Conversations as text, through a tokenizer's chat template, and which of it the assistant said."""

import re
from bisect import bisect_left
from typing import Any, NamedTuple

from jinja2 import TemplateError

from fedsim.data.config import Replies
from fedsim.data.records import BadRecord
from fedsim.errors import InvalidInput

REFUSED = "conversation that the chat template refuses"
"""Why a record is left out; the template's own words may follow."""
REWRITTEN = "conversation of which the chat template writes a reply otherwise once the talk goes on"
SILENT = "conversation without a reply of the assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template says itself what the model generates."""
LONGEST_REASON = 200
QUOTED = 8
"""Characters from which on a content found in the template's words is no chance."""


class Conversation(NamedTuple):
    """A conversation as text.

    Attributes:
        text: As the chat template writes it.
        said: Its ranges of characters that count in the loss: first, and after the last; ascending and apart.
    """

    text: str
    said: list[tuple[int, int]]

    @property
    def ends_said(self) -> bool:
        """Whether the last of the text counts, but for blanks."""
        return bool(self.said) and self.said[-1][1] >= len(self.text.rstrip())


class ChatTemplate:
    """A tokenizer's chat template.

    A reply begins where the text differs once the assistant says something else, and ends where its turn ends: behind
    the token that ends turns, where the template writes one. A template that marks what is generated
    ({% generation %}) says both itself.

    Args:
        tokenizer: A Hugging Face tokenizer.
        replies: last: the last message alone counts in the loss, where it is the assistant's; else everything counts.
            all: every message of the assistant counts, and nothing else.

    Raises:
        InvalidInput: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, replies: Replies):
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            hint = "Use a chat model's tokenizer, or set tokenizer.chat_template."
            raise InvalidInput("data.messages-column", "given", "left out: the tokenizer has no chat template", hint)
        self._tokenizer, self._replies = tokenizer, replies
        self._marked = bool(MARKED.search(str(template)))
        self._special_tokens = tuple(map(str, getattr(tokenizer, "added_tokens_decoder", {}).values()))

    def render(self, messages: list[dict[str, str]]) -> Conversation:
        """A conversation as text.

        Args:
            messages: At least one, each with a role and a content.

        Raises:
            BadRecord: If the template refuses the conversation, if it has no reply where all replies are to count, or
                if the template writes a reply otherwise in the whole conversation than at the end of its beginning.
        """
        try:
            talk = self._marks(messages) if self._marked else self._by_turns(messages)
        # What templates raise themselves, and what comes of their arithmetic on roles and contents.
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise BadRecord(_refusal(error, messages)) from None
        if not talk.said and self._replies == "all":
            raise BadRecord(SILENT)
        return talk if talk.said else Conversation(talk.text, [(0, len(talk.text))])

    def _by_turns(self, messages: list[dict[str, str]]) -> Conversation:
        """What the assistant said, found by writing the conversation turn after turn."""
        whole = self._write(messages)
        last = len(messages) - 1
        said = []
        for place in range(last + 1) if self._replies == "all" else [last]:
            if messages[place]["role"] != "assistant":
                continue
            beginning = whole if place == last else self._write(messages[: place + 1])
            if not whole.startswith(beginning):
                raise BadRecord(REWRITTEN)
            first = self._begins(messages[: place + 1], beginning)
            said.append((first, max(first, self._turn_ends(beginning))))
        return Conversation(whole, said)

    def _begins(self, messages: list[dict[str, str]], text: str) -> int:
        """Where the last message's content begins in the text."""
        content = messages[-1]["content"].lstrip()
        other = "1" if content.startswith("0") else "0"
        otherwise = self._write([*messages[:-1], messages[-1] | {"content": other}])
        ends = range(1, min(len(text), len(otherwise)) + 1)
        return bisect_left(ends, True, key=lambda end: text[:end] != otherwise[:end])

    def _turn_ends(self, text: str) -> int:
        """Where the last turn ends: with the token for it, and not with the line break that many templates add."""
        written = text.rstrip()
        return len(written) if written.endswith(self._special_tokens) else len(text)

    def _marks(self, messages: list[dict[str, str]]) -> Conversation:
        """What the assistant said, by the template's own marks."""
        talk = self._write_marked(messages)
        if self._replies == "all":
            return talk
        if messages[-1]["role"] != "assistant":
            return Conversation(talk.text, [])
        earlier = len(self._write_marked(messages[:-1]).said) if len(messages) > 1 else 0
        return Conversation(talk.text, talk.said[earlier:])

    def _write(self, messages: list[dict[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def _write_marked(self, messages: list[dict[str, str]]) -> Conversation:
        # Here, because whoever has a Hugging Face tokenizer has it loaded already.
        from transformers.utils.chat_template_utils import render_jinja_template

        written: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self._tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        texts, marks = written  # its declared type is another
        return Conversation(texts[0], [(first, last) for first, last in marks[0] if first < last])


def _refusal(error: Exception, messages: list[dict[str, str]]) -> str:
    """Why, in the template's own words unless they quote what somebody said: a reason is the same for many."""
    words = " ".join(str(error).split())
    contents = [" ".join(message["content"].split()) for message in messages]
    quoted = any(content in words for content in contents if len(content) >= QUOTED)
    return REFUSED if quoted or not words else f"{REFUSED} ({words[:LONGEST_REASON]})"
