"""What type checkers and editors see of the names that `fedsim` imports when they are first used."""

from clients.mod import (
    user_level_clip_mod as user_level_clip_mod,
)
from experiments.face.compare import (
    compare as compare,
)
from experiments.face.fine_tune import (
    fine_tune as fine_tune,
)
from experiments.face.outcomes import (
    Compared as Compared,
)
from experiments.face.outcomes import (
    FineTuned as FineTuned,
)
from experiments.face.outcomes import (
    Swept as Swept,
)
from experiments.face.sweep import (
    sweep as sweep,
)
from fedsim.clip import (
    Clip as Clip,
)
from fedsim.config import (
    RunConfig as RunConfig,
)
from fedsim.errors import (
    Failure as Failure,
)
from fedsim.errors import (
    InvalidInput as InvalidInput,
)
from fedsim.gradients import (
    Batch as Batch,
)
from fedsim.gradients import (
    CausalLanguageModel as CausalLanguageModel,
)
from fedsim.gradients import (
    Objective as Objective,
)
from fedsim.gradients import (
    RowLosses as RowLosses,
)
from fedsim.gradients import (
    SequenceClassification as SequenceClassification,
)
from fedsim.gradients import (
    SequenceToSequence as SequenceToSequence,
)
from fedsim.gradients import (
    clipped_sum as clipped_sum,
)
from fedsim.plan import (
    ElsPlan as ElsPlan,
)
from fedsim.plan import (
    Plan as Plan,
)
from fedsim.plan import (
    UlsPlan as UlsPlan,
)
from fedsim.plan import (
    UserSizes as UserSizes,
)
from fedsim.privacy.accountant import (
    Accountant as Accountant,
)
from fedsim.privacy.accountant import (
    delta_bounds as delta_bounds,
)
from fedsim.privacy.accountant import (
    epsilon_bounds as epsilon_bounds,
)
from fedsim.privacy.calibration import (
    calibrate_group_size as calibrate_group_size,
)
from fedsim.privacy.calibration import (
    calibrate_noise_multiplier as calibrate_noise_multiplier,
)
from fedsim.privacy.calibration import (
    calibrate_sampling_probability as calibrate_sampling_probability,
)
from fedsim.privacy.calibration import (
    calibrate_steps as calibrate_steps,
)
from fedsim.privacy.events import (
    Adjacency as Adjacency,
)
from fedsim.privacy.events import (
    BinomialMixtureGaussian as BinomialMixtureGaussian,
)
from fedsim.privacy.events import (
    Composed as Composed,
)
from fedsim.privacy.events import (
    FixedSizeSubsampledGaussian as FixedSizeSubsampledGaussian,
)
from fedsim.privacy.events import (
    Gaussian as Gaussian,
)
from fedsim.privacy.events import (
    MixtureOfGaussians as MixtureOfGaussians,
)
from fedsim.privacy.events import (
    PoissonSubsampledGaussian as PoissonSubsampledGaussian,
)
from fedsim.privacy.events import (
    RandomAllocatedGaussian as RandomAllocatedGaussian,
)
from fedsim.privacy.events import (
    Repeated as Repeated,
)
from fedsim.privacy.events import (
    TruncatedPoissonSubsampledGaussian as TruncatedPoissonSubsampledGaussian,
)
from fedsim.privacy.mechanisms.mechanism import (
    MECHANISMS as MECHANISMS,
)
from fedsim.privacy.mechanisms.mechanism import (
    Mechanism as Mechanism,
)
from fedsim.rows import (
    TokenRows as TokenRows,
)
from fedsim.sampling import (
    SAMPLINGS as SAMPLINGS,
)
from fedsim.sampling import (
    Sampling as Sampling,
)
from server.callbacks import (
    BegunRun as BegunRun,
)
from server.callbacks import (
    Callback as Callback,
)
from server.strategy import (
    UserLevelDP as UserLevelDP,
)

__version__: str
