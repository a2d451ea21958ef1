"""The models that text canaries are put into: one made for them, or any causal language model."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.audit.text_canaries import TOKENS, TextFinding, text_canaries
from experiments.audit.training import Learner
from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, Objective
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.models.load import LoadedModel, embedded_tokens, load_model
from fedsim.models.trainable import freeze_others
from fedsim.plan import Plan, UserSizes
from fedsim.resources import open_resources


@dataclass(frozen=True)
class TextModel:
    """A language model that has read nothing, made to hold canaries.

    Attributes:
        model: One block between embeddings, which alone are trained: gradients of texts of different tokens are then
            almost orthogonal, while those of what all texts go through have much in common.
        objective: Next tokens.
        vocabulary: Its tokens, int.
    """

    model: torch.nn.Module
    objective: Objective
    vocabulary: np.ndarray

    @classmethod
    def of_size(cls, vocabulary: int = 8192, width: int = 128) -> "TextModel":
        """With a million trained parameters by default; the same at each call.

        Args:
            vocabulary: Tokens.
            width: Of the embeddings.
        """
        shape = GPT2Config(
            vocab_size=vocabulary,
            n_positions=TOKENS,
            n_embd=width,
            n_layer=1,
            n_head=1,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT2LMHeadModel(shape)
        model.train(False)
        freeze_others(model, ("wte",))
        return cls(model, CausalLanguageModel(), np.arange(vocabulary))


def model_for_text(config: ModelConfig) -> tuple[Learner, np.ndarray, int]:
    """The model to put canaries into, the tokens that it knows, int, and the most that it reads in a row.

    Args:
        config: What to load; by its default path the model that is made for canaries.

    Raises:
        InvalidInput: The model cannot be loaded, or is no causal language model; or has options and no path.
    """
    if config.path != DEFAULT_PATH:
        loaded = load_model(config)
        return loaded, vocabulary_of(loaded), min(TOKENS, loaded.context or TOKENS)
    if config != ModelConfig():
        hint = "Without it canaries get a model of their own, to which no option applies."
        raise InvalidInput("model.path", config.path, "a model's name or folder with other options of it", hint)
    made = TextModel.of_size()
    return made, made.vocabulary, TOKENS


def vocabulary_of(loaded: LoadedModel) -> np.ndarray:
    """Tokens of a causal language model that texts can be made of: all but the special ones, int.

    Raises:
        InvalidInput: The model has another task.
    """
    if loaded.config.task != "causal-lm":
        raise InvalidInput("model.task", loaded.config.task, "causal-lm with --text-canaries")
    found: np.ndarray = np.setdiff1d(np.arange(embedded_tokens(loaded)), loaded.tokenizer.all_special_ids)
    return found


def text_canaries_among_users(
    config: RunConfig, plan: Plan, *, canaries: int, confidence: float, seed: int
) -> TextFinding:
    """Train a run's model again, on its training users and canaries.

    Args:
        config: The run's.
        plan: Its plan; the population grows by the canaries.
        canaries: How many.
        confidence: Of the intervals and of the bound.
        seed: Seed of coins, texts, sampling and noise.
    """
    resources = open_resources(config)
    train = resources.store.split("train")
    return text_canaries(
        config,
        plan,
        resources.loaded,
        vocabulary_of(resources.loaded),
        canaries=canaries,
        optimizer=config.optimizer_for(plan, UserSizes.of_users(train)),
        confidence=confidence,
        seed=seed,
        train=train,
        row_tokens=resources.row_tokens,
    )
