from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.core import ConfigError, IntegrityError
from luthier.runs.spec import OptimSpec
from luthier.surgery import Group
from luthier.training.optimiser import Descent, Lomo, NotFinite, Optimiser, _by_name, optimiser_of

torch.set_num_threads(1)


class Net(nn.Module):
    """Two layers that share a weight, a bias that comes into nothing, and a layer of its own."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))
        self.tied, self.bias, self.out, self.unused = draw(5, 5), draw(5), draw(3, 5), draw(4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.tied.T + self.bias)
        return torch.tanh(h @ self.tied.T) @ self.out.T


def spec(name: str, **fields: Any) -> OptimSpec:
    return OptimSpec(**{"name": name, "lr": 0.1, "clip": 0.0, **fields})  # type: ignore[arg-type]


def batches(dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, y = (torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for n in ((7, 5), (7, 3)))
        yield x, y


def loss_of(net: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((net(batch[0]) - batch[1]) ** 2).sum()


def descend(settings: OptimSpec, groups: list[Group], dtype: torch.dtype = torch.float64) -> Net:
    net = Net(dtype)
    optimiser = optimiser_of(settings, dict(net.named_parameters()), groups, 1.0)
    for step, batch in enumerate(batches(dtype)):
        factor = 1 - step / 10
        if isinstance(optimiser, Lomo):
            if not optimiser.in_one_pass:
                with optimiser.measuring():
                    loss_of(net, batch).backward()
            with optimiser.applying(factor, optimiser.norm()):
                loss_of(net, batch).backward()
        else:
            loss_of(net, batch).backward()
            optimiser.clip(optimiser.norm())
            optimiser.step(factor)
            optimiser.zero_grad()
    return net


GROUPS = [Group(("out",), lr_factor=3.0, weight_decay=0.0), Group(("bias",), decay_to=1.0)]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_plain_descent_equals_the_frameworks(clip: float) -> None:
    ours = descend(spec("sgd", clip=clip, weight_decay=0.2), GROUPS[:1])
    net = Net()
    groups = [{"params": [p], "lr": 0.3 if n == "out" else 0.1, "weight_decay": 0.0 if n == "out" else 0.2}
              for n, p in net.named_parameters() if n != "unused"]  # fmt: skip
    reference = torch.optim.SGD(groups)
    rates = [g["lr"] for g in reference.param_groups]
    for step, batch in enumerate(batches()):
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 10)
        reference.zero_grad()
        loss_of(net, batch).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], clip)
        reference.step()
    for name, parameter in net.named_parameters():
        # The framework clips to clip / (norm + 1e-6).
        torch.testing.assert_close(dict(ours.named_parameters())[name], parameter, rtol=1e-5 if clip else 1e-12, atol=0)


@pytest.mark.acid("lomo", 3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_inside_the_backward_pass_it_is_the_same_to_the_bit(clip: float, dtype: torch.dtype) -> None:
    settings = {"clip": clip, "weight_decay": 0.2}
    after, inside = (descend(spec(name, **settings), GROUPS, dtype) for name in ("sgd", "lomo"))
    for (name, one), other in zip(after.named_parameters(), inside.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(after.tied, Net(dtype).tied)
    assert torch.equal(after.unused, Net(dtype).unused)  # no gradient: no decay


@pytest.mark.acid("lomo", 2)
def test_two_tensors_never_hold_a_gradient_together() -> None:
    net = Net()
    optimiser = Lomo(dict(net.named_parameters()), [], spec("lomo"), 0.1)
    inner, held = optimiser._update, []

    def update(*args: Any) -> None:
        held.append(sum(p.grad is not None for p in net.parameters()))
        inner(*args)

    optimiser._update = update  # type: ignore[method-assign]
    with optimiser.applying(1.0):
        loss_of(net, next(batches())).backward()
    assert held == [1, 1, 1]  # the shared weight once
    assert all(p.grad is None for p in net.parameters())
    assert optimiser.gradient_bytes() == net.tied.nbytes
    assert optimiser.state_bytes() == 0


def test_measuring_moves_nothing_and_finds_the_norm_and_who_has_a_gradient() -> None:
    net, other = Net(), Net()
    optimiser = Lomo(dict(net.named_parameters()), [], spec("lomo"), 0.1)
    plain = Descent(dict(other.named_parameters()), [], spec("sgd"), 0.1)
    batch = next(batches())
    with optimiser.measuring():
        loss_of(net, batch).backward()
    loss_of(other, batch).backward()
    assert optimiser.norm() == plain.norm() > 0
    assert [optimiser.has_gradient(p) for p in net.parameters()] == [plain.has_gradient(p) for p in other.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    loss_of(net, batch).backward()  # somebody else's backward pass is left alone
    assert net.out.grad is not None


def test_a_gradient_that_is_not_finite_stops_the_pass_where_it_comes() -> None:
    net = Net()
    optimiser = Lomo(dict(net.named_parameters()), [], spec("lomo"), 0.1)
    net.tied.register_hook(lambda g: g * torch.nan)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(NotFinite, match="tied"), optimiser.applying(1.0):
        loss_of(net, next(batches())).backward()
    assert torch.equal(net.tied, before["tied"])
    assert not torch.equal(net.out, before["out"])  # came first: the caller has to go back
    assert optimiser.updates == 0
    assert net.tied.grad is None


def test_a_state_without_moments_goes_out_and_in_and_fits_nothing_else() -> None:
    named = dict(Net().named_parameters())
    one, two = (Descent(named, [], spec("sgd"), 0.1) for _ in range(2))
    one.counts["tied"] = 4
    two.load(one.tensors())
    assert two.counts == one.counts and set(one.tensors()) == {"counts"}
    with pytest.raises(IntegrityError, match="first"):
        Optimiser(named, [], spec("adamw"), 0.1).load(one.tensors())


def test_descent_asks_for_its_rate() -> None:
    with pytest.raises(ConfigError, match=r"optim.lr: lomo is plain gradient descent.*--lr"):
        OptimSpec(name="lomo")


def test_an_optimiser_that_is_let_go_holds_neither_moments_nor_gradients() -> None:
    net = Net()
    named = dict(net.named_parameters())
    optimiser = optimiser_of(spec("adamw"), named, [], 0.1)
    x, y = next(batches())
    (net(x) - y).square().sum().backward()
    assert optimiser.first and optimiser.second and any(p.grad is not None for p in named.values())
    optimiser.let_go()
    assert not optimiser.first and not optimiser.second
    assert all(p.grad is None for p in named.values())


def test_where_several_groups_name_one_tensor_factors_multiply_and_what_is_stated_stays() -> None:
    first = Group(("x", "y"), lr_factor=2.0, weight_decay=0.1, decay_to=1.0)
    one = _by_name([first, Group(("x",), lr_factor=3.0)])
    assert one["y"] is first
    assert (one["x"].lr_factor, one["x"].weight_decay, one["x"].decay_to) == (6.0, 0.1, 1.0)
    last = _by_name([first, Group(("x",), weight_decay=0.0, decay_to=0.5)])["x"]
    assert (last.lr_factor, last.weight_decay, last.decay_to) == (2.0, 0.0, 0.5)
