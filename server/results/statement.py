"""What a run guarantees: its statement, and the card that goes with its model."""

from fedsim.config import RunConfig
from fedsim.gradients import ParameterLayout
from fedsim.optimizer import WeightAverage
from fedsim.plan import Plan
from fedsim.privacy.earlier import Earlier, own_event
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.ledger import Ledger
from fedsim.resources import Resources
from fedsim.statement import NoiseOrigin, PrivacyStatement, privacy_statement, write_card
from fedsim.versions import versions
from server.results.run_folder import RunFolder


def statement_of(
    config: RunConfig,
    resources: Resources,
    plan: Plan,
    ledger: Ledger,
    earlier: Earlier,
    rounds: int,
    average: WeightAverage,
    evaluation: PrivateEvaluation | None = None,
) -> PrivacyStatement:
    """The statement of a run and of those that it goes on from, from plan and ledger."""
    origin: NoiseOrigin
    if config.noise.secure:
        origin = "secure-exact" if config.engine.exact else "secure"
    else:
        origin = "statistical-exact" if config.engine.exact else "statistical"
    seeds = {"sampling": config.sampling_seed, "noise": config.noise_seed}
    return privacy_statement(
        plan,
        own_event(ledger.entries),
        sizes=ParameterLayout.of(resources.loaded.model).sizes,
        steps=rounds,
        seeds_given=tuple(name for name, seed in seeds.items() if seed is not None),
        noise_origin=origin,
        versions=versions(),
        ledger=ledger.path.name,
        post_processing=average.in_words,
        earlier=Earlier.in_ledger(ledger.entries, earlier.not_covered),
        classes_from_data=resources.classes_from_data,
        made_up_users=resources.made_up_users,
        evaluation=evaluation,
    )


def write_card_of(folder: RunFolder, config: RunConfig, resources: Resources) -> None:
    """Of the model as it is exported: merged adapters are a plain one."""
    loaded = resources.loaded
    write_card(
        folder.privacy,
        folder.card,
        base=config.model.path,
        task=config.model.task,
        adapters=loaded.adapted and config.model.export != "merged",
        classes=resources.store.classes if config.model.task == "sequence-classification" else (),
        module=type(loaded.model).__qualname__ if loaded.given else None,
    )
