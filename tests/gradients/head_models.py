"""Small language models that end in a plain head, whose weight is used in various ways."""

import torch

WORDS, WIDTH = 300, 40
"""Units of 35 tokens and less are kept as factors: some of the ragged ones, and others not."""


class Language(torch.nn.Module):
    """Tokens, a layer, and a head, which may share its weight with the tokens' table."""

    def __init__(self, tied: bool, bias: bool, table: torch.nn.Embedding | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = table or torch.nn.Embedding(WORDS, WIDTH)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.token.weight
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.token(input_ids)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).view(1, -1, 1)
        return self.head(torch.tanh(self.layer(self.looked_up(input_ids).cumsum(1) / places)))


class Times(torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2.5


class Normed(torch.nn.Embedding):
    """Has no rule: its gradients are held, of units of any length."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(super().forward(input), dim=-1)


class OtherWords(Language):
    """The tied table is asked for the words' neighbours."""

    def looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.token((input_ids + 1) % WORDS)


class LookedUpTwice(Language):
    def looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.token(input_ids) + self.token((input_ids + 1) % WORDS)


class HeadTwice(Language):
    """Another layer has the head's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__(tied, False)
        self.other = torch.nn.Linear(WIDTH, WORDS)
        self.other.weight = self.head.weight

    def looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        known = self.token(input_ids)
        return known + torch.tanh(self.other(known))[..., :WIDTH]


MODELS = {
    "untied": lambda: Language(False, False),
    "untied, with bias": lambda: Language(False, True),
    "tied": lambda: Language(True, False),
    "tied, with bias": lambda: Language(True, True),
    "tied, scaled": lambda: Language(True, False, Times(WORDS, WIDTH)),
    "tied, with padding": lambda: Language(True, False, torch.nn.Embedding(WORDS, WIDTH, padding_idx=3)),
}
"""In which nothing but a table shares the head's weight, and is asked for the words that the model is given."""
MET = {
    "at other words": lambda: OtherWords(True, False),
    "twice": lambda: LookedUpTwice(True, False),
    "by a second layer": lambda: HeadTwice(False),
    "by a second layer and the table": lambda: HeadTwice(True),
    "by what is held": lambda: Language(True, False, Normed(WORDS, WIDTH)),
}
"""In which something else uses it."""
