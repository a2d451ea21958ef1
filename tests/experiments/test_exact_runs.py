"""Exact mode: the trained model does not depend on how its users were spread over workers."""

from pathlib import Path

import pytest
from small_flags import SMALL

from experiments.run import main


def trained(folder: Path, algorithm: str, engine: list[str]) -> bytes:
    """The bytes of the model that a short noised run leaves."""
    plan = ["--plan.algorithm", algorithm, "--plan.epsilon", "8", "--plan.rounds", "2", "--engine.exact"]
    assert main(["train", *SMALL, *plan, *engine, "--output", str(folder)]) == 0
    return (folder / "model" / "model.safetensors").read_bytes()


def local(workers: int) -> list[str]:
    return ["--engine.kind", "local", "--engine.workers", str(workers)]


@pytest.mark.parametrize("algorithm", ["uls", "els"])
def test_the_model_is_bit_for_bit_the_same_for_one_two_and_four_workers(tmp_path: Path, algorithm: str) -> None:
    alone = trained(tmp_path / "1", algorithm, local(1))
    assert trained(tmp_path / "2", algorithm, local(2)) == alone
    assert trained(tmp_path / "4", algorithm, local(4)) == alone


def test_one_user_a_message_on_ray_gives_the_same_bits(tmp_path: Path) -> None:
    alone = trained(tmp_path / "1", "uls", local(1))
    ray = ["--engine.kind", "ray", "--engine.workers", "2", "--engine.users-per-message", "1"]
    assert trained(tmp_path / "ray", "uls", ray) == alone
