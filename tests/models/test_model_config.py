import subprocess
import sys

import pytest

from fedsim.config import from_flat, to_flat
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig, SmallModelConfig


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"path": " "}, "model.path"),
        ({"task": "translation"}, "model.task"),
        ({"num_labels": 1}, "model.num-labels"),
        ({"lora_rank": -1}, "model.lora-rank"),
        ({"lora_alpha": 0.0, "lora_rank": 2}, "model.lora-alpha"),
        ({"lora_targets": ("q_proj",)}, "model.lora-targets"),
        ({"base_dtype": "float16", "lora_rank": 2}, "model.base-dtype"),
        ({"base_dtype": "bfloat16"}, "model.base-dtype"),
        ({"quantise": "int8", "lora_rank": 2}, "model.quantise"),
        ({"quantise": "nf4"}, "model.quantise"),
        ({"quantise": "nf4", "lora_rank": 2, "task": "sequence-classification"}, "model.quantise"),
        ({"base_dtype": "bfloat16", "lora_rank": 2, "task": "sequence-classification"}, "model.base-dtype"),
        ({"lora_targets": ("all-linear", "q_proj"), "lora_rank": 2}, "model.lora-targets"),
        ({"lora_targets": ("q_proj(",), "lora_rank": 2}, "model.lora-targets"),
        ({"lora_init": "pissa", "lora_rank": 2}, "model.lora-init"),
        ({"lora_init": "orthonormal"}, "model.lora-init"),
        ({"lora_init": "orthonormal", "lora_rank": 2, "use_dora": True}, "model.lora-init"),
        ({"use_dora": True}, "model.use-dora"),
        ({"use_dora": True, "lora_rank": 2, "quantise": "nf4"}, "model.use-dora"),
        ({"use_rslora": True}, "model.use-rslora"),
        ({"rank_pattern": ("q_proj=2",)}, "model.rank-pattern"),
        *(
            ({"lora_rank": 2, "rank_pattern": (one,)}, "model.rank-pattern")
            for one in ("q_proj", "q_proj=", "q_proj=0", "q_proj=2.5", "=2", "(=2")
        ),
        *(
            ({"lora_rank": 2, "alpha_pattern": (one,)}, "model.alpha-pattern")
            for one in ("q_proj=-1", "q_proj=inf", "q_proj=nan", "q_proj=much")
        ),
        ({"modules_to_save": ("lm_head",)}, "model.modules-to-save"),
        ({"modules_to_save": (" ",), "lora_rank": 2}, "model.modules-to-save"),
        ({"modules_to_save": ("lm_head",), "lora_rank": 2, "base_dtype": "bfloat16"}, "model.base-dtype"),
        ({"modules_to_save": ("lm_head",), "lora_rank": 2, "quantise": "nf4"}, "model.quantise"),
        ({"trainable": ("bias",), "lora_rank": 2}, "model.trainable"),
        ({"trainable": ("all", "bias")}, "model.trainable"),
        ({"trainable": ("bias", "[")}, "model.trainable"),
        ({"seed": -1}, "model.seed"),
        ({"threads": 0}, "model.threads"),
    ],
)
def test_a_wrong_field_is_named(fields: dict, named: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        ModelConfig(**fields)
    assert raised.value.field == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"layers": 0}, "layers"),
        ({"width": 30, "heads": 4}, "width"),
        ({"context": 1}, "context"),
        ({"vocabulary_size": 256}, "vocabulary-size"),
        ({"steps": -1}, "steps"),
        ({"batch_rows": 0}, "batch-rows"),
        ({"learning_rate": float("nan")}, "learning-rate"),
    ],
)
def test_a_wrong_field_of_the_default_model_is_named(fields: dict, named: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        SmallModelConfig(**fields)
    assert raised.value.field == f"model.small.{named}"


def test_the_configuration_needs_no_torch() -> None:
    code = "import sys, fedsim.models.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_option_of_adapters_travels_as_flat_values_and_back() -> None:
    config = ModelConfig(
        lora_rank=2,
        lora_targets=(r"h\.0\..*",),
        rank_pattern=("c_proj=3",),
        alpha_pattern=("c_proj=2.5",),
        use_rslora=True,
        lora_init="orthonormal",
        modules_to_save=("ln_f",),
    )
    assert from_flat(ModelConfig, to_flat(config)) == config
    assert (config.ranks, config.alphas) == ({"c_proj": 3}, {"c_proj": 2.5})
