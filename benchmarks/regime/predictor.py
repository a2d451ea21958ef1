"""What the planner expects of each setting, with gradients measured on public users."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.regime.outcomes import Results, Setting
from benchmarks.regime.rates import MODEL
from benchmarks.regime.studies import REGROUPED, SYNTHETIC, file_of
from experiments.plan.command import PUBLIC_USERS
from experiments.public_norms import measure_curves
from fedsim.cache import default_cache
from fedsim.data.config import DataConfig
from fedsim.data.ingest import open_or_build
from fedsim.data.sources import public_texts
from fedsim.models.config import ModelConfig
from fedsim.models.load import load_model
from fedsim.plan import UserSizes
from fedsim.planner import SignalCurve
from fedsim.planner.signal import worth_of_rounds

LANGUAGE = ("shakespeare", "ubuntu-irc", *REGROUPED, *SYNTHETIC)
"""Corpora on which a language model is trained, as public users can be: for a classifier nothing is measured."""


def predictor(results: Results, corpora: Path, output: Path) -> tuple[Results, Callable[[Setting], float]]:
    """The effective rounds of a setting, and the results that they are predicted of.

    Args:
        results: Of the study.
        corpora: The folder of corpora.
        output: The study's folder, where its synthetic users are.
    """
    of_models = results.among(lambda one: one.corpus in LANGUAGE)
    loaded = load_model(ModelConfig(path=str(corpora / MODEL)), public_texts=public_texts, cache=default_cache())
    parameters = sum(one.numel() for one in loaded.model.parameters() if one.requires_grad)
    public = open_or_build(PUBLIC_USERS, loaded.tokenizer)
    _, signal = measure_curves(loaded.model, loaded.objective, public)

    def users_of(corpus: str) -> UserSizes:
        path = SYNTHETIC[corpus].write(corpora, output) if corpus in SYNTHETIC else corpora / file_of(corpus)
        data = DataConfig(source="files", path=str(path), sequence_length=64)
        return UserSizes.of_users(open_or_build(data, loaded.tokenizer).split("train"))

    own = _curves(signal, {one.corpus for one in of_models.settings}, users_of)

    def worth(one: Setting) -> float:
        share = own[one.corpus](one.group_size if one.arm == "uls" else 1)
        return worth_of_rounds(one.place.rounds, share, one.units, one.noise, parameters)

    return of_models, worth


def _curves(
    signal: SignalCurve, corpora: Iterable[str], users_of: Callable[[str], UserSizes]
) -> dict[str, SignalCurve]:
    return {corpus: signal.among(users_of(corpus)) for corpus in corpora}
