"""The clipped sum with kernels for what is bfloat16: that of plain torch, within the clip, on small models."""

import numpy as np
import pytest
import torch

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients import (
    CLIP_MARGIN,
    CausalLanguageModel,
    ClippedSum,
    clipped_sum,
    head,
    layer_paths,
)
from fedsim.gradients.clipping import ModelClip
from fedsim.gradients.model import ParameterLayout
from fedsim.gradients.per_unit import logits, outer_products, pass_gradients
from fedsim.gradients.per_unit.formed_again import FormedAgain
from fedsim.gradients.per_unit.pass_gradients import PassGradients
from fedsim.gradients.per_unit.unit_gradients import UnitGradients
from fedsim.gradients.rows.segments import Segments
from fedsim.rows import TokenRows

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

VOCABULARY = 70
"""No multiple of what a head is filled up to."""
KERNELS = {
    "weighted_products": (pass_gradients, outer_products),
    "gram_norms_of": (pass_gradients, outer_products),
    "loss_gradient_": (logits,),
}


class HeadWithBias(torch.nn.Module):
    """Tokens, a layer, and a head that has a bias; the last layer's output is the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = torch.nn.Embedding(VOCABULARY, width)
        self.layer = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, VOCABULARY)
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        return self.head(torch.tanh(self.layer(self.token(input_ids).cumsum(1) / places)))


def gpt2() -> torch.nn.Module:
    """Its head is tied to its tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=40, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def adapted_llama() -> torch.nn.Module:
    """Adapters on a bfloat16 base."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, max_position_embeddings=8, initializer_range=0.2,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config).to(torch.bfloat16), LoraConfig(r=24, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave half of the gradients zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {"tied GPT-2": gpt2, "head with bias": lambda: HeadWithBias(48), "LoRA on a Llama": adapted_llama}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that ran."""
    names: set[str] = set()
    for name, modules in KERNELS.items():
        for module in modules:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, name=name, kernel=kernel: names.add(name) or kernel(*a))
    return names


def ragged(few: int = VOCABULARY) -> tuple[TokenRows, np.ndarray]:
    """Units of one to three rows, of few tokens: Gram norms are the cheaper ones."""
    rng = np.random.default_rng(0)
    counts, lengths = np.array([1, 1, 2, 3, 1]), np.array([3, 6, 4, 3, 2, 3, 2, 8])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenRows(tokens=rng.integers(0, few, offsets[-1]), offsets=offsets), np.repeat(np.arange(5), counts)


def half_sum(model: torch.nn.Module, rows: TokenRows, ids: np.ndarray, clip: Clip) -> ClippedSum:
    return clipped_sum(model, rows, ids, clip, objective=CausalLanguageModel(), autocast=torch.bfloat16)


def test_the_sum_is_that_of_plain_torch(
    model: torch.nn.Module, taken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per parameter, up to bfloat16."""
    rows, ids = ragged()
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        norms = half_sum(model, rows, ids, Clip(norm=1e9)).norms
        clip = Clip(norm=float(norms.median()) * 1.01)
        expected = half_sum(model, rows, ids, clip)
    assert not taken
    found = half_sum(model, rows, ids, clip)
    assert taken == set(KERNELS)
    torch.testing.assert_close(found.norms, expected.norms, rtol=2**-6, atol=0)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-3, atol=0)
    layout, whole = ParameterLayout.of(model), float(expected.total.norm())
    for (name, ours), theirs in zip(
        layout.views(found.total).items(), layout.views(expected.total).values(), strict=True
    ):
        assert float((ours - theirs).norm()) <= 2**-6 * float(theirs.norm()) + 2**-9 * whole, name


def test_copies_of_a_unit_reach_no_further_than_so_many_clip_norms(model: torch.nn.Module, taken: set[str]) -> None:
    """The sum's norm taken in float64. Factors are next above a number of few bits, so that rounding hides nothing."""
    copies = 2
    for unit, few, factor in ((1, 2, 0.75), (3, VOCABULARY, 0.25)):  # one row of tokens said again; three, padded
        rows, ids = ragged(few)
        own = np.flatnonzero(ids == unit)
        repeated, whose = rows.take(np.tile(own, copies)), np.repeat(np.arange(copies), len(own))
        norm = float(half_sum(model, repeated, whose, Clip(norm=1e9)).norms.max())
        clip = Clip(norm=factor * (1 + 1e-7) * norm * (1 + CLIP_MARGIN))
        reach = float(half_sum(model, repeated, whose, clip).total.double().norm()) / (copies * clip.norm)
        assert 1 - 2 * CLIP_MARGIN < reach <= 1
    assert any("Gram norm" in path for path in layer_paths(model).values())
    assert taken == set(KERNELS)


@pytest.mark.parametrize("model", ["tied GPT-2", "head with bias"], indirect=True)
def test_logits_that_are_formed_again_give_the_same_sum(
    model: torch.nn.Module, taken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one unit at a time, or several."""
    rows, ids = ragged()
    clip = Clip(norm=float(half_sum(model, rows, ids, Clip(norm=1e9)).norms.median()) * 1.01)
    expected = half_sum(model, rows, ids, clip)
    terms: list[FormedAgain] = []
    add = FormedAgain.add_weighted
    monkeypatch.setattr(FormedAgain, "add_weighted", lambda self, *a: (terms.append(self), add(self, *a)))
    monkeypatch.setitem(head.KEPT_ELEMENTS, "cpu", 0)
    monkeypatch.setitem(head.GROUP_ELEMENTS, "cpu", 16 * 128)
    monkeypatch.setattr(head, "chunk_positions", lambda words, device: 1)
    taken.clear()
    found = half_sum(model, rows, ids, clip)
    together = [units.stop - units.start for units in terms[0].groups]
    assert min(together) == 1 < max(together)
    assert taken == set(KERNELS)
    for name in ("total", "norms", "losses"):
        one, other = getattr(found, name), getattr(expected, name)
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()), name


def test_a_unit_with_an_infinity_adds_exactly_zero(taken: set[str]) -> None:
    torch.manual_seed(0)
    model = HeadWithBias(48)
    rows, ids = ragged(VOCABULARY - 1)
    clip, others = Clip(norm=1e-2), ids != 1
    half_sum(model, rows, ids, clip)  # tried by now
    taken.clear()
    with torch.no_grad():
        model.token.weight[-1] = float("inf")
        model.layer.weight.abs_()  # so that an infinity stays one
    rows.tokens[rows.offsets[1] + 4] = VOCABULARY - 1
    found = half_sum(model, rows, ids, clip)
    expected = half_sum(model, rows.take(np.flatnonzero(others)), ids[others], clip)
    assert found.finite.tolist() == [True, False, True, True, True]
    assert torch.isfinite(found.total).all()
    assert taken == set(KERNELS)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-5, atol=1e-5 * float(expected.total.abs().max()))


WIDTHS = {"a": (40, 50), "b": (40, 50), "c": (50, 40), "twice": (40, 50), "vector": (40,), "longer held": (6, 8)}


@pytest.mark.parametrize(
    ("lengths", "most", "launches"),
    [
        ([5, 5, 5, 5], 1, (1, 2)),  # nothing is copied
        ([2, 5, 6, 6, 14, 15], 2**28, (3, 6)),  # a bucket each, and in sums each block by itself
        ([2, 5, 6, 6, 14, 15], 1, (12, 14)),  # one parameter after the other
        ([2, 5, 22, 23, 30, 70], 2**28, (3, 8)),  # the longer ones' gradients are formed, and the longest one's held
    ],
)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_parameters_of_ragged_units_share_launches(
    lengths: list[int], most: int, launches: tuple[int, int], side_by_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two blocks, some of them scaled; one layer is called twice, one is held of the longer units alone."""
    generator = torch.Generator().manual_seed(0)
    segments = Segments(np.array(lengths), torch.device("cpu"))
    rows: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    gradients = {name: UnitGradients(torch.Size(shape), len(lengths)) for name, shape in WIDTHS.items()}
    for name in (*WIDTHS, "twice"):
        shape = WIDTHS[name]
        right_width = shape[1] if len(shape) == 2 else 1
        left, right = (
            torch.randn(segments.total, width, generator=generator).bfloat16() for width in (shape[0], right_width)
        )
        rows.append((name, left, right))
        if name == "vector":
            gradients[name].add_held(segments.sums(left.float() * right.float()))
        else:
            gradients[name].add_outer(left, right, segments)
    exact = {name: torch.zeros(len(lengths), *shape, dtype=torch.float64) for name, shape in WIDTHS.items()}
    for name, left, right in rows:
        whole = zip(segments.offsets[:-1], segments.offsets[1:], strict=True)
        each = torch.stack([left[a:b].double().T @ right[a:b].double() for a, b in whole])
        exact[name] += each.view(exact[name].shape)
    sizes = {name: tuple(shape) for name, shape in WIDTHS.items()}
    offsets = np.cumsum([0, *(int(np.prod(shape)) for shape in sizes.values())]).tolist()
    layout = ParameterLayout(names=tuple(sizes), shapes=tuple(sizes.values()), offsets=tuple(offsets))
    blocks = (("a", "c", "vector"), ("b", "twice", "longer held"))
    scales = {name: 1.0 for name in sizes} | {"a": 0.5, "vector": 3.0, "twice": 0.25}
    clip = Clip(norm=1.0, scales=scales, blocks=tuple(ClipBlock(parameters=part, share=0.5**0.5) for part in blocks))
    for limit in ("BUNDLE_ELEMENTS", "COPIED_ELEMENTS"):
        monkeypatch.setattr(pass_gradients, limit, most)
    if side_by_side:  # as on a GPU
        monkeypatch.setattr(pass_gradients, "_side_by_side", lambda gradients: gradients.held is not None)
    launched: list[str] = []
    for kernel in ("gram_norms_of", "weighted_products"):
        run = getattr(pass_gradients, kernel)
        monkeypatch.setattr(
            pass_gradients, kernel, lambda *a, kernel=kernel, run=run: (launched.append(kernel), run(*a))[1]
        )
    found = PassGradients(gradients, ModelClip(clip, layout), segments)
    squared, spread = found.squared_norms()
    for block, names in enumerate(blocks):
        expected = sum((exact[name] / scales[name]).flatten(1).square().sum(1) for name in names)
        torch.testing.assert_close(squared[block], expected, rtol=1e-5, atol=0)
        assert (spread[block, :-1] > 0).all()
    factors = torch.rand(2, len(lengths), generator=generator)
    targets = {name: torch.zeros(shape) for name, shape in sizes.items()}
    left_out = torch.zeros(len(lengths), dtype=torch.bool)
    left_out[-1] = True
    found.zero(left_out)
    found.add_weighted(targets, factors)
    for block, names in enumerate(blocks):
        for name in names:
            weights = (factors[block] * ~left_out).double().view(-1, *[1] * len(sizes[name]))
            expected = (weights * exact[name]).sum(0)
            assert float((targets[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name
    assert (launched.count("gram_norms_of"), launched.count("weighted_products")) == launches
