import subprocess
import sys

import pytest

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
