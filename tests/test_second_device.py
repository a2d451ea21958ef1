"""The second device itself: it refuses what a GPU refuses, and computes everything else as a CPU does."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import second_device
import torch
from second_device import DeviceMismatch, DeviceTensor


@pytest.fixture
def there() -> Iterator[torch.device]:
    with second_device.second_device() as device:
        yield device
        second_device._met.mismatches.clear()


REFUSED: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "a sum": lambda x, host: x + host,
    "a sum in place": lambda x, host: x.add_(host),
    "a sum in place on the host": lambda x, host: host.add_(x),
    "a number of the host that is written to": lambda x, host: host[0, 0].add_(x[0, 0]),
    "a sum with numpy's": lambda x, host: torch.from_numpy(np.ones((3, 3), np.float32)) + x,
    "a product": lambda x, host: x @ host,
    "a product of the host": lambda x, host: host @ x,
    "a product written to the host": lambda x, host: torch.matmul(x, x, out=host),
    "a layer": lambda x, host: torch.nn.functional.linear(x, host),
    "a table": lambda x, host: torch.nn.functional.embedding(host.long(), x),
    "a concatenation": lambda x, host: torch.cat([x, host]),
    "a stack of numbers": lambda x, host: torch.stack([x[0, 0], host[0, 0]]),
    "a mask": lambda x, host: x.masked_fill_(host > 0, 0.0),
    "a choice": lambda x, host: torch.where(x > 0, x, host),
    "what is added by index": lambda x, host: x.index_add_(0, torch.arange(3), x),
    "what is gathered": lambda x, host: x.gather(0, host.long()),
    "what is scattered": lambda x, host: x.scatter_add_(0, host.long(), x),
    "what is put in place": lambda x, host: x.index_put_((torch.arange(3, device=x.device),), host),
    "the host indexed": lambda x, host: host[x.long()],
    "a loss": lambda x, host: torch.nn.functional.cross_entropy(x, host[0].long()),
    "many at once": lambda x, host: torch._foreach_add_([x], [host]),
    "numpy's view": lambda x, host: x.numpy(),
    "numpy's function": lambda x, host: np.exp(x),
    "a generator of the host": lambda x, host: x.normal_(generator=torch.Generator().manual_seed(0)),
    "a generator for the host": lambda x, host: torch.randn(3, generator=torch.Generator(x.device)),
    "an array": lambda x, host: np.asarray(x),
    "an index beyond the end": lambda x, host: torch.nn.functional.embedding(torch.full((2,), 3, device=x.device), x),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_refuses_is_refused(what: str, there: torch.device) -> None:
    x, host = torch.ones(3, 3, device=there), torch.zeros(3, 3)
    with pytest.raises(DeviceMismatch):
        REFUSED[what](x, host)


def test_a_mismatch_that_is_caught_is_told_all_the_same() -> None:
    with (
        pytest.raises(DeviceMismatch, match=r"aten\.add"),
        second_device.second_device() as there,
        contextlib.suppress(RuntimeError),
    ):
        torch.ones(2, device=there).add(torch.ones(2))


def test_numbers_and_indices_of_the_host_are_taken(there: torch.device) -> None:
    x = torch.arange(6.0, device=there)
    assert (x * torch.tensor(2.0))[torch.tensor([1, 2])].tolist() == [2.0, 4.0]
    x[torch.tensor([0])] = torch.tensor(9.0)
    assert float(x[0]) == 9.0
    assert len(second_device._met.host_indices) == 2


def test_whatever_makes_a_tensor_makes_it_where_it_is_asked_to(there: torch.device) -> None:
    like = torch.ones(2, 2, device=there)
    values = np.ones((2, 2), np.float32)
    made = [
        torch.zeros(2, 2, device=there), torch.empty(2, 2, device="cuda"), torch.full((2, 2), 1.0, device=there),
        torch.randn(2, device=there, generator=torch.Generator(there).manual_seed(0)),
        torch.arange(4, device=there), torch.tensor([[1, 2]], device=there), torch.randn(2, 2, device=there),
        torch.as_tensor(values, device=there), torch.from_numpy(values).to(there), torch.ones(2, 2).to("cuda"),
        torch.from_numpy(values).pin_memory().to(there, non_blocking=True), torch.zeros_like(like),
        like.new_zeros(3), like.new_tensor([1.0]), torch.ones(1).to(like), like.to(torch.float64), like.clone(),
    ]  # fmt: skip
    assert all(isinstance(tensor, DeviceTensor) and tensor.device == there for tensor in made)
    assert not any(isinstance(t, DeviceTensor) for t in (torch.zeros(2), torch.zeros_like(like, device="cpu")))
    assert like.to(there) is like
    assert torch.as_tensor(like, device=there) is like
    assert type(like.cpu()) is torch.Tensor
    np.testing.assert_array_equal(like.cpu().numpy(), values)


def test_views_share_memory(there: torch.device) -> None:
    x = torch.zeros(4, device=there)
    x.view(2, 2)[1].add_(1.0)
    part = x[:2]
    part += 2
    torch._foreach_add_(list(x.split(2)), [torch.ones(2, device=there)] * 2)
    assert x.tolist() == [3.0, 3.0, 2.0, 2.0]
    assert part.device == x.device == there


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        assert x.device == gradient.device
        return 2 * gradient


def test_autograd_goes_through_it(there: torch.device) -> None:
    """Layers, attention, tables, losses, own functions and hooks; backward and grad."""
    torch.manual_seed(0)
    table, layer = torch.nn.Embedding(7, 8), torch.nn.Linear(8, 7)
    tokens, labels = torch.randint(0, 7, (2, 5)), torch.randint(0, 7, (10,))

    def gradients(device: torch.device | str) -> list[torch.Tensor]:
        for module in (table, layer):
            module.to(device)
        seen = []
        x = table(tokens.to(device))
        x.register_hook(lambda gradient: seen.append(gradient))
        heads = x.view(2, 5, 2, 4).transpose(1, 2)
        x = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        x = torch.nn.functional.layer_norm(Doubled.apply(x.transpose(1, 2).reshape(10, 8)), (8,))
        loss = torch.nn.functional.cross_entropy(layer(x), labels.to(device))
        found = list(torch.autograd.grad(loss, [table.weight, layer.bias], retain_graph=True))
        loss.backward()
        return [*found, layer.weight.grad, *seen]

    expected = gradients("cpu")
    layer.weight.grad = None
    found = gradients(there)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.device == there
        torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers_step_on_it(rule: type, there: torch.device) -> None:
    ends = []
    for device in ("cpu", there):
        parameter = torch.arange(4.0).to(device).requires_grad_()
        optimizer = rule([parameter], lr=0.1, fused=True)
        for _ in range(2):
            (parameter**2).sum().backward()
            optimizer.step()
        ends.append(parameter.detach().cpu())
    torch.testing.assert_close(*ends)


def test_autocast_computes_in_bfloat16_what_a_gpu_does(there: torch.device) -> None:
    x, layer = torch.randn(3, 4, device=there), torch.nn.Linear(4, 4).to(there)
    with torch.autocast("cuda", torch.bfloat16):
        product = layer(x)
        assert product.dtype == (x @ x.t()).dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.nn.functional.layer_norm(product, (4,)).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert layer(x).dtype == torch.float32
    product.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.bmm(*[x[None, :3, :3].bfloat16()] * 2, out_dtype=torch.float32).dtype == torch.float32


def test_inference_mode_is_no_way_around_it(there: torch.device) -> None:
    x, layer = torch.randn(3, 4), torch.nn.Linear(4, 2)
    expected = layer(x).softmax(-1)
    layer.to(there)
    with torch.inference_mode():
        found = layer(x.pin_memory().to(there, non_blocking=True)).softmax(-1)
        torch.testing.assert_close(found.double().cpu(), expected.detach().double())
        with pytest.raises(DeviceMismatch):
            layer(x)


def test_shared_parameters_are_shared_on_it(there: torch.device) -> None:
    table, head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    model = torch.nn.ModuleList([table, head]).to(there)
    assert head.weight is table.weight
    assert [isinstance(p, torch.nn.Parameter) and p.device == there for p in model.parameters()] == [True]
