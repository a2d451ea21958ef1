"""docs/howto-mechanism.md, run as its reader would: the code, the commands, and what the page says of them."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import howto_pages
import numpy as np
import pytest
from howto_pages import AUDIT, Fedsim, code, command, python, read, unboxed, written
from mechanism_properties import MechanismProperties
from small_flags import LOCAL, SMALL

from experiments.audit.canaries import CanaryUsers
from experiments.audit.rig import FAR, Rig
from experiments.run import main
from fedsim.errors import InvalidInput
from fedsim.plan import UlsPlan
from fedsim.privacy.mechanisms import MECHANISMS, Mechanism

PAGE, NAME = "howto-mechanism", "per_layer:per-layer-clip"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the page's code."""
    return written(PAGE, "per_layer", tmp_path_factory.mktemp("mechanism"))


@pytest.fixture(scope="module")
def fedsim() -> Iterator[Fedsim]:
    with howto_pages.warm_fedsim() as run:
        yield run


@pytest.fixture
def importable(folder: Path) -> Iterator[None]:
    with howto_pages.importable(folder, MECHANISMS._classes, NAME):
        yield


def plan_by(mechanism: Mechanism) -> UlsPlan:
    return UlsPlan(
        num_users=1,
        group_size=1,
        sampling_probability=1.0,
        clip_norm=2.0,
        noise_multiplier=1.0,
        steps=1,
        delta=1e-5,
        mechanism=mechanism,
    )


def test_training_on_two_ray_workers_states_what_was_done(folder: Path, fedsim: Fedsim) -> None:
    arguments = command(PAGE, "train")
    assert arguments[arguments.index("--engine.workers") + 1] == "2"
    done = fedsim([*arguments, *SMALL, "--plan.rounds", "2", "--output", "run"], folder)
    assert done.returncode == 0, done.stderr
    stated = read(folder / "run" / "privacy.json")
    assert stated["private"] is True
    assert stated["mechanism_name"] == NAME
    # Two layers; the embeddings of tokens and positions and the last normalisation are blocks of their own.
    words = stated["contribution_bound"]["in_words"]
    assert f"its share ({1 / math.sqrt(5):g}) of L2 norm 1, in each of 5 blocks of parameters" in words
    assert f"standard deviation {stated['noise_multiplier']:g} " in stated["mechanism"]
    again = fedsim(stated["recompute"].removeprefix("python -m experiments.run ").split(), folder)
    assert json.loads(again.stdout)["epsilon"] == stated["epsilon"]


def test_comparing_leaves_two_arms_and_a_report(folder: Path, fedsim: Fedsim) -> None:
    arguments = ["--plan.rounds", "2", "--output", "comparison"]
    done = fedsim([*command(PAGE, "compare"), *SMALL, *LOCAL, *arguments], folder)
    assert done.returncode == 0, done.stderr
    comparison = folder / "comparison"
    arms = read(comparison / "comparison.json")["arms"]
    assert [arm["mechanism"] for arm in arms] == ["gaussian", "per-layer-clip"]
    assert arms[0]["noise_multiplier"] == arms[1]["noise_multiplier"]
    (comparison / "report.html").unlink()
    done = fedsim(["report", "comparison"], folder)
    assert done.returncode == 0, done.stderr
    assert "per-layer-clip" in (comparison / "report.html").read_text(encoding="utf-8")


def test_its_audit_passes(folder: Path, fedsim: Fedsim) -> None:
    done = fedsim([*command(PAGE, "audit"), *AUDIT], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout


@pytest.mark.usefixtures("importable")
def test_every_layer_of_a_far_update_comes_to_its_share() -> None:
    plan = plan_by(MECHANISMS.build(NAME))
    far = np.linspace(FAR, FAR**2, 8, dtype=np.float32)  # its layers' norms are very unlike
    users = CanaryUsers(np.ones(1, dtype=np.int64), np.zeros(1))
    # The same noise with and without the user: what is left is what reached the sum.
    rig = Rig(plan, users, far[None], sampling_seed=1, noise_seed=2)
    put_in = rig.seen(rig.round(), 0).sum - rig.seen(rig.round(np.empty(0, dtype=np.int64)), 0).sum
    assert list(rig.sizes) == ["blocks.0.weight", "blocks.1.weight"]
    first, second = np.split(put_in, [rig.sizes["blocks.0.weight"]])
    share = pytest.approx(plan.clip_norm / math.sqrt(2), rel=1e-4)  # less the clip's margin, in float32 sums
    assert np.linalg.norm(first) == share
    assert np.linalg.norm(second) == share


@pytest.mark.usefixtures("importable")
class TestItsProperties(MechanismProperties):
    name = NAME
    options = ("by=matrix",)


@pytest.mark.usefixtures("importable")
def test_its_option_is_heeded_and_nonsense_is_refused() -> None:
    mechanism = MECHANISMS.build(NAME, ["by=matrix"])
    sizes = {"h.0.a.weight": 4, "h.0.a.bias": 2, "h.0.b.weight": 3, "out.weight": 5}
    clips = [MECHANISMS.build(NAME, [f"by={by}"]).noise(None, 0.0, sizes).clip(1.0) for by in ("layer", "matrix")]
    assert [len(clip.blocks) for clip in clips] == [2, 3]
    assert type(mechanism).options()["by"]
    with pytest.raises(InvalidInput, match="layer or matrix"):
        MECHANISMS.build(NAME, ["by=head"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:per-layer-clip", "No module named 'no_such_module'. Its folder must be on PYTHONPATH"),
        ("per_layer:another", "The module per_layer registers no such class"),
        ("per-layer-clip", "A class of your own is named module:name"),
    ],
)
@pytest.mark.usefixtures("importable")
def test_a_name_that_leads_nowhere_is_one_sentence(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--plan.mechanism", name]) == 2
    assert words in unboxed(capsys.readouterr().err)


PROGRAM = """

from fedsim.plan import UlsPlan

plan = UlsPlan(num_users=9, group_size=1, sampling_probability=1.0, clip_norm=1.0, noise_multiplier=1.0, steps=1,
               delta=1e-5, mechanism=PerLayerClip())
print(plan.epsilon().upper)
try:
    plan.to_json()
except InvalidInput as error:
    print(error)
"""


def test_a_class_of_the_program_itself_is_accounted_and_does_not_travel(folder: Path) -> None:
    (folder / "program.py").write_text(code(PAGE) + PROGRAM, encoding="utf-8")
    done = python(["program.py"], folder)
    assert done.returncode == 0, done.stderr
    epsilon, error = done.stdout.splitlines()
    assert float(epsilon) > 0
    assert "plan.mechanism is '__main__:per-layer-clip'" in error
    assert "Move PerLayerClip into a module of its own" in error


def test_the_installed_command_finds_the_module_too(folder: Path) -> None:
    # An installed script has its own folder first on the path, not the working directory.
    script = folder / "bin" / "fedsim"
    script.parent.mkdir()
    script.write_text("import sys\nfrom experiments.run import main\nsys.exit(main())\n", encoding="utf-8")
    done = python([str(script), "audit", "--plan.mechanism", "per_layer:another"], folder)
    assert "The module per_layer registers no such class" in unboxed(done.stderr)
