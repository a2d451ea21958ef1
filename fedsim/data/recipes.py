"""Data sets of the literature, by name: where they are on the hub, and which column says whose a text is."""

import dataclasses

from fedsim.data.config import DataConfig

RECIPES: dict[str, dict[str, str]] = {
    # Posts (questions and answers, as Markdown) by the account that wrote them; deleted accounts have no user id.
    "stackoverflow": {"path": "mikex86/stackoverflow-posts", "user_column": "OwnerUserId", "text_column": "Body"},
    # News articles by the site they appeared on.
    "cc-news": {"path": "vblagoje/cc_news", "user_column": "domain", "text_column": "text"},
    # E-mails by their sender.
    "enron": {"path": "corbt/enron-emails", "user_column": "from", "text_column": "body"},
}
"""Fields of DataConfig that each recipe fills in where they are not given."""


def resolve(config: DataConfig) -> DataConfig:
    """The configuration with a recipe's fields, and the default column names, filled in."""
    values = dict(RECIPES[config.recipe]) if config.recipe else {}
    if config.source in ("files", "hub"):
        values.setdefault("user_column", "user_id")
        if not config.messages_column:
            values.setdefault("text_column", "text")
    else:
        values = {}
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    if config.messages_column:
        missing.pop("text_column", None)
    return dataclasses.replace(config, **missing)  # type: ignore[arg-type]
