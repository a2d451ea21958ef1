"""LoRA adapters (Hu et al. 2021) through PEFT, drawn anew over a frozen base."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fedsim.errors import InvalidInput
from fedsim.models.config import ALL_LINEAR, ModelConfig, is_expression
from fedsim.models.quiet import quiet_transformers
from fedsim.models.targets import adaptable, default_targets, trained_in_full

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
}
"""PEFT's names of the tasks."""
ADAPTER = "default"
"""PEFT's name of the one adapter that a layer has here."""
ORTHONORMAL = 1e-4
"""How far A·Aᵀ may be from the identity, in any value, where A is read from a file that may hold half precision."""


def add_adapters(model: Any, config: ModelConfig, drawn: Iterable[str] = ()) -> torch.nn.Module:
    """The model with LoRA adapters, everything else frozen but a classifier's head, what was drawn at random and the
    modules to save.

    Adapters are float32 whatever the precision of the base, and start as zero: the adapted model first computes what
    the base computes. Their random halves are drawn from config.seed, so every process draws the same.

    Args:
        model: A Hugging Face model.
        config: Rank above 0, alpha, targets and the like.
        drawn: Names of weights that the checkpoint lacks.

    Raises:
        InvalidInput: No layer matches the targets, or one that does returns more than a product, or a name that was
            given is no layer's.
    """
    from peft import LoraConfig, get_peft_model  # here, see has_adapters

    _require_modules(model, config.modules_to_save)
    in_full = [*dict.fromkeys([*trained_in_full(model, config, drawn), *config.modules_to_save])]
    named = config.lora_targets
    targets = _targets(named) if named else default_targets(model, [n for one in in_full for n in _ending(model, one)])
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules=targets or ALL_LINEAR,
        rank_pattern=config.ranks,
        alpha_pattern=config.alphas,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights="gaussian" if config.lora_init == "gaussian" else True,
        modules_to_save=in_full or None,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        bias="none",
        task_type=TASK_TYPES[config.task],
    )
    known = _linear_layers(model)
    others = _matched_others(model, config.lora_targets)
    if others:
        allowed = f"some of the model's linear layers: {', '.join(sorted(known))}"
        hint = f"{others[0]} returns more than a product, as routers do."
        raise InvalidInput("model.lora-targets", config.lora_targets, allowed, hint)
    try:
        with drawing(config.seed), quiet_transformers():
            adapted = get_peft_model(model, settings)
    except (ValueError, TypeError) as error:
        said = str(error).removeprefix("[PEFT:PeftType.LORA] ")
        # PEFT quotes the layers that it refuses.
        offered = sorted(known - set(re.findall(r"'(\w+)'", said)))
        allowed = f"some of the model's linear layers: {', '.join(offered) or 'it has none that can be adapted'}"
        chosen = config.lora_targets or "every linear layer, unless set"
        raise InvalidInput("model.lora-targets", chosen, allowed, f"PEFT said: {said}") from error
    _require_used(adapted, config)
    if config.lora_init == "orthonormal":
        with drawing(config.seed):
            _draw_orthonormal(adapted)
        freeze_orthonormal(adapted)
    return adapted


def freeze_orthonormal(adapted: Any) -> None:
    """Let of every adapter B alone be trained, over an A whose rows are orthonormal.

    With ΔW = s·B·A and A·Aᵀ = 1, ‖ΔW‖² = s²·tr(B·A·Aᵀ·Bᵀ) = s²·‖B‖² (Frobenius norms), and so for any difference of
    two B: a clip of B's updates is one of the weights' updates, and Gaussian noise on B is Gaussian noise on the
    weights, of equal size in all directions within A's rows. An A that is fixed at random is the federated "FFA-LoRA"
    (Sun et al. 2024), whose rows are not orthonormal.

    Args:
        adapted: A PEFT model with LoRA adapters.

    Raises:
        InvalidInput: Some A has other rows.
    """
    for name, layer in adapters_of(adapted):
        if ADAPTER not in layer.lora_A:
            raise InvalidInput("model.lora-init", "orthonormal", "adapters on linear layers alone", f"{name} is none.")
        rows = layer.lora_A[ADAPTER].weight
        off = (rows.double() @ rows.double().T - torch.eye(len(rows), dtype=torch.float64)).abs().max()
        if not off <= ORTHONORMAL:
            allowed = "left out for adapters whose A has other rows"
            raise InvalidInput("model.lora-init", "orthonormal", allowed, f"{name}: A·Aᵀ is {float(off):.2g} off.")
        rows.requires_grad_(False)


def has_adapters(model: object) -> bool:
    """Whether a model is one of PEFT's, with adapters.

    PEFT need not be imported to tell. That takes seconds, most of them for the compilers that bitsandbytes brings
    wherever it is installed: every process would pay them, and most have no adapters.
    """
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapters_of(adapted: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers with a LoRA adapter, by name."""
    return ((name, module) for name, module in adapted.named_modules() if hasattr(module, "lora_A"))


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Within it what is drawn, and computed of it, has the same bits in every process."""
    with single_threaded(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within it sums have the same bits however many threads the process has."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _draw_orthonormal(adapted: Any) -> None:
    """Rows of every A from the orthogonal group's uniform law, by the QR decomposition of normal draws."""
    for name, layer in adapters_of(adapted):
        weight = layer.lora_A[ADAPTER].weight if ADAPTER in layer.lora_A else None
        if weight is None:
            continue
        if weight.shape[0] > weight.shape[1]:
            hint = f"The layer {name} has {weight.shape[1]} inputs, fewer than its rank of {weight.shape[0]}."
            raise InvalidInput("model.lora-init", "orthonormal", "a rank of no more than any layer's inputs", hint)
        with torch.no_grad():
            weight.copy_(torch.nn.init.orthogonal_(torch.empty(weight.shape, dtype=torch.float64)))


def _targets(named: tuple[str, ...]) -> str | list[str]:
    """PEFT's target_modules: a list of names, or one expression for a layer's whole name."""
    if not named or named == (ALL_LINEAR,):
        return ALL_LINEAR
    if not any(map(is_expression, named)):
        return list(named)
    return "|".join(f"(?:{one})" if is_expression(one) else rf"(?:.*\.)?{re.escape(one)}" for one in named)


def _ending(model: Any, one: str) -> list[str]:
    """Whole names of the modules whose names end so."""
    return [name for name, _ in model.named_modules() if f".{name}".endswith(f".{one}")]


def _require_modules(model: Any, named: tuple[str, ...]) -> None:
    """Refuse modules to save that are not there."""
    names = [name for name, _ in model.named_modules() if name]
    for one in named:
        if not _ending(model, one):
            parts = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
            raise InvalidInput("model.modules-to-save", one, f"the end of a module's name: {', '.join(parts)}")


def _require_used(adapted: Any, config: ModelConfig) -> None:
    """Refuse names of which PEFT would take no notice, for no adapted layer has them."""
    layers = list(adapted.base_model.targeted_module_names)
    offered = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    for one in config.lora_targets:
        whole = one == ALL_LINEAR or (is_expression(one) and any(re.fullmatch(one, layer) for layer in layers))
        if not whole and not any(f".{layer}".endswith(f".{one}") for layer in layers):
            raise InvalidInput("model.lora-targets", one, f"a layer's name; of those named there are {offered}")
    for field, patterns in (("rank-pattern", config.ranks), ("alpha-pattern", config.alphas)):
        for one in patterns:
            if not any(re.match(rf"(.*\.)?({one})$", layer) for layer in layers):
                raise InvalidInput(f"model.{field}", one, f"the end of an adapted layer's name: {offered}")


def _linear_layers(model: Any) -> set[str]:
    """Last names of the layers that adapters may go on: linear ones, but the head."""
    head = model.get_output_embeddings()
    return {name.rpartition(".")[2] for name, m in model.named_modules() if adaptable(m) and m is not head}


def _matched_others(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Names of linear layers that match the targets and must not be adapted."""
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not adaptable(m)]
    return [name for name in linear if any(f".{name}".endswith(f".{one}") for one in targets)]
