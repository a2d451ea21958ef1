"""Products of float32 numbers are computed as such, whatever torch or its environment permits, and settings kept."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from gradient_checks import VOCABULARY, Tables, ragged

from fedsim.clip import Clip
from fedsim.errors import Failure
from fedsim.gradients import CausalLanguageModel, LocalSteps, clipped_sum, clipped_units
from fedsim.gradients import model as model_module
from fedsim.gradients.model import exact_products

CPU = torch.device("cpu")
PLACES = [("generic", "all"), *((b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul", "conv", "rnn"))]
OLDER = {
    "matmul precision": torch.get_float32_matmul_precision,
    "cuda allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "cudnn allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "float16 accumulation": lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
}


def settings() -> dict[object, object]:
    """Every setting as torch tells it; it refuses to tell an older one that disagrees with a newer one."""
    found: dict[object, object] = {place: torch._C._get_fp32_precision_getter(*place) for place in PLACES}
    for name, read in OLDER.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "refused"
    return found


def rounding() -> bool:
    """Whether any setting lets float32 operands be rounded."""
    found = settings()
    loose = any(found[place] in ("tf32", "bf16") for place in PLACES)
    return loose or found["matmul precision"] != "highest" or found["cuda allow_tf32"] or found["cudnn allow_tf32"]


@pytest.fixture(autouse=True)
def settings_left_alone() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    for place in PLACES:
        usual = "tf32" if place in (("cuda", "conv"), ("cuda", "rnn")) else "none"
        torch._C._set_fp32_precision_setter(*place, usual)


def allow_cuda() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def allow_all() -> None:
    torch.backends.fp32_precision = "tf32"


def allow_one() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def allow_onednn() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def disallow_convolutions() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def accumulate_in_half() -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = True


ALLOWED: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": allow_cuda,
    "everything": allow_all,
    "one place": allow_one,
    "one place, and an older setting": lambda: (allow_one(), torch.set_float32_matmul_precision("medium")),
    "an older setting, and one place": lambda: (torch.set_float32_matmul_precision("highest"), allow_one()),
    "oneDNN": allow_onednn,
    "not in convolutions": disallow_convolutions,
    "half": accumulate_in_half,
}


class Watching(Tables):
    """Notes at each forward pass and each backward pass whether operands may be rounded."""

    def __init__(self) -> None:
        super().__init__(8, True, None)
        self.seen: list[bool] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(rounding())
        logits = super().forward(input_ids)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self.seen.append(rounding()))
        return logits


@pytest.mark.parametrize("allowed", ALLOWED)
@pytest.mark.parametrize("way", ["fast", "reference", "units", "local steps"])
def test_nothing_is_rounded_within_and_the_settings_are_the_same_afterwards(way: str, allowed: str) -> None:
    torch.manual_seed(0)
    model, (rows, ids), clip = Watching(), ragged(units=3), Clip(norm=0.1)
    ALLOWED[allowed]()
    before = settings()
    arguments = {"objective": CausalLanguageModel()}
    if way == "units":
        for _ in clipped_units(model, rows, ids, clip, **arguments):
            assert settings() == before  # between two units the settings are the caller's
    elif way == "local steps":
        clipped_sum(model, rows, ids, clip, local_steps=LocalSteps(steps=2, learning_rate=0.1), **arguments)
    else:
        clipped_sum(model, rows, ids, clip, method=way, **arguments)
    assert len(model.seen) > 3
    assert not any(model.seen)
    assert settings() == before


@pytest.mark.parametrize("method", ["fast", "reference"])
def test_autocast_around_the_call_changes_nothing(method: str) -> None:
    torch.manual_seed(0)
    model, (rows, ids), clip = Tables(48, True, None), ragged(units=4), Clip(norm=1e-3)
    expected = clipped_sum(model, rows, ids, clip, objective=CausalLanguageModel(), method=method)
    with torch.autocast("cpu", torch.bfloat16):
        found = clipped_sum(model, rows, ids, clip, objective=CausalLanguageModel(), method=method)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.norms, expected.norms)


def test_places_inherit_afterwards_what_they_inherited_before() -> None:
    torch.backends.fp32_precision = "tf32"
    with exact_products(CPU):
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch._C._get_fp32_precision_getter("mkldnn", "matmul") == "ieee"


def test_settings_come_back_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()

    def failing() -> None:
        with exact_products(CPU):
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        failing()
    assert settings() == before


def test_the_last_thread_out_puts_the_settings_back() -> None:
    torch.set_float32_matmul_precision("medium")
    before = settings()
    entered, leave = threading.Event(), threading.Event()
    inside: list[bool] = []

    def other() -> None:
        with exact_products(CPU):
            entered.set()
            leave.wait(10)
            inside.append(rounding())

    thread = threading.Thread(target=other)
    with exact_products(CPU):
        thread.start()
        assert entered.wait(10)
    inside.append(rounding())
    leave.set()
    thread.join()
    assert inside == [False, False]
    assert settings() == before


def test_settings_changed_meanwhile_make_the_sum_of_no_use() -> None:
    class Meddling(Tables):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            torch.set_float32_matmul_precision("high")
            return super().forward(input_ids)

    rows, ids = ragged(units=2)
    for method in ("fast", "reference"):
        with pytest.raises(Failure, match="changed in torch while"):
            clipped_sum(
                Meddling(4, False, None), rows, ids, Clip(norm=0.1), objective=CausalLanguageModel(), method=method
            )


@pytest.mark.parametrize("kept", ["TF32", "bfloat16", "two of bfloat16"])
def test_a_device_that_rounds_all_the_same_is_refused(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with an environment variable that a library reads by itself."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if kept == "TF32":  # 13 of float32's 24 bits go
            return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        head = x.bfloat16().float()
        return head if kept == "bfloat16" else head + (x - head).bfloat16().float()

    product = torch.Tensor.__matmul__
    monkeypatch.setattr(model_module, "_tried", set())
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(rounded(a), rounded(b)))
    rows, ids = ragged(units=2)
    before = settings()
    with pytest.raises(Failure, match=r"on cpu are rounded.*NVIDIA_TF32_OVERRIDE"):
        clipped_sum(Tables(4, False, None), rows, ids, Clip(norm=0.1), objective=CausalLanguageModel())
    assert settings() == before
    monkeypatch.undo()
    with exact_products(CPU):
        assert "cpu" in model_module._tried


def test_norms_bound_what_is_summed_where_the_processor_would_round() -> None:
    """On a processor with bfloat16 products; elsewhere "medium" does nothing, and this shows as little."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    from fedsim.rows import TokenRows

    model = Tables(64, True, None)
    rng = np.random.default_rng(0)
    rows = TokenRows.from_lists([rng.integers(1, VOCABULARY, 32).tolist() for _ in range(4)])
    found = clipped_sum(model, rows, np.zeros(4, int), Clip(norm=1e-2), objective=CausalLanguageModel())
    torch.set_float32_matmul_precision("highest")
    expected = clipped_sum(model, rows, np.zeros(4, int), Clip(norm=1e-2), objective=CausalLanguageModel())
    assert torch.equal(found.total, expected.total)
    assert float(found.total.double().norm()) <= 1e-2
