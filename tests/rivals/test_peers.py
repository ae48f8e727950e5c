"""Agreement with the public code of the rivals, where that is right; run on request only.

Set the environment variable ``TELEPORT_PEERS`` to a folder that holds clones of
Rose-STL-Lab/Symmetry-Teleportation, Rose-STL-Lab/Teleportation-Optimization, sahagobinda/GPM and
vitalab/neuralteleportation (the last also needs networkx). Nothing of them is in this repository.
Single functions are taken out of their files, so that what these files import is not needed.
"""

import ast
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport.rivals import (
    BOOTH,
    ChangeOfBasisTeleporter,
    SymmetryTeleporter,
    group_action,
    preactivation_action,
    so2_teleport,
)
from teleport.rivals.group_action import bend_of
from teleport.subspace import energy_rank
from tests.support.strategies import seeds

ROOT = os.environ.get("TELEPORT_PEERS")
pytestmark = pytest.mark.skipif(
    ROOT is None, reason="TELEPORT_PEERS is not set to a folder with the public code of the rivals"
)
SLOPE = 0.1  # theirs is fixed to LeakyReLU(0.1)


def take(file: str, *names: str) -> Callable[..., Any]:
    """Functions of a peer's file, alone; the last one is returned."""
    path = Path(str(ROOT)) / file
    if not path.exists():
        pytest.skip(f"{path} is missing")
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    space: dict[str, Any] = {"np": np, "torch": torch, "nn": nn}
    space |= {"sigma": nn.LeakyReLU(SLOPE), "sigma_inv": nn.LeakyReLU(1 / SLOPE)}
    exec(compile(tree, str(path), "exec"), space)
    return space[names[-1]]


def perceptron(widths: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, a, generator=generator) / a**0.5 for a, b in pairwise(widths)]


LATER = "Teleportation-Optimization/learn-to-teleport/teleportation.py"


@given(seeds, st.integers(1, 4), st.sampled_from([True, False]))
def test_one_action_is_theirs_on_the_batch(seed: int, samples: int, exact: bool) -> None:
    """Their V' is ours projected on the span of the batch: equal on it, not elsewhere."""
    theirs = take(LATER, "group_action_MLP")
    torch.manual_seed(seed)
    v, u = perceptron([5, 6, 3], seed)
    x = torch.randn(5, samples)
    element = torch.eye(6) + 0.05 * torch.randn(6, 6)
    bend = bend_of([("", nn.LeakyReLU(SLOPE))])
    inverse = "exact" if exact else "first_order"
    our_v, our_u = group_action([v, u], x.mT, [element], [bend], inverse=inverse)
    given_element = element if exact else element - torch.eye(6)
    their_u, their_v = theirs(u, v, x, torch.linalg.pinv(x), given_element, using_T=not exact)
    torch.testing.assert_close(their_u, our_u, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(their_v @ x, our_v @ x, rtol=1e-3, atol=1e-4)


@given(seeds, st.integers(1, 6))
def test_the_action_on_preactivations_is_theirs_on_the_batch(seed: int, samples: int) -> None:
    """Their U' is ours projected on the span of the batch's activations."""
    theirs = take("Teleportation-Optimization/gradient_descent_mlp_utils.py", "group_action")
    v, u = (m.double() for m in perceptron([7, 6, 3], seed))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, samples, generator=generator, dtype=torch.float64)
    t = 0.05 * torch.randn(6, 6, generator=generator, dtype=torch.float64)
    sigma = nn.Tanh()
    our_v, our_u = preactivation_action([v, u], x.mT, [torch.eye(6) + t], [sigma])
    their_u, their_v = theirs(u, v, x, torch.linalg.pinv(x), t, sigma)
    hidden = sigma(their_v @ x)
    assume(float(torch.linalg.cond(hidden)) < 1e4)
    torch.testing.assert_close(their_v, our_v)
    torch.testing.assert_close(their_u @ hidden, our_u @ hidden)
    torch.testing.assert_close(their_u, our_u @ hidden @ torch.linalg.pinv(hidden))


@pytest.mark.parametrize("seed", range(5))
def test_one_ascent_step_with_the_first_order_inverse_is_theirs(seed: int) -> None:
    """Square inputs, so that their projection on the batch is the identity; one hidden layer,
    because they carry activations on that the next layer does not see."""
    names = ("group_action_MLP", "teleport_MLP", "teleport_MLP_gradient_ascent")
    theirs = take(LATER, *names)
    weights = perceptron([5, 6, 3], seed)
    torch.manual_seed(seed)
    x, y = torch.randn(5, 5), torch.randn(3, 5)
    lr = 1e-4

    def loss(ws: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (ws[1] @ nn.LeakyReLU(SLOPE)(ws[0] @ x) - y).square().mean()

    ws = [w.clone().requires_grad_() for w in weights]
    moved = theirs(ws, x, y, lr, [5, 5, 6, 3], loss, step=1)
    model = nn.Sequential(nn.Linear(5, 6, False), nn.LeakyReLU(SLOPE), nn.Linear(6, 3, False))
    for linear, w in zip((model[0], model[2]), weights, strict=True):
        linear.weight.data = w.clone()
    # Their objective is ‖g‖², ours half of it.
    SymmetryTeleporter(model, 1, 2 * lr, "first_order", max_drift=None).step(
        lambda: (model(x.mT).mT - y).square().mean()
    )
    for linear, w, start in zip((model[0], model[2]), moved, weights, strict=True):
        change, wanted = linear.weight.detach() - start, w.detach() - start
        torch.testing.assert_close(change, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("seed", range(5))
def test_their_first_script_loses_the_loss_and_the_exact_inverse_keeps_it(seed: int) -> None:
    """Their regression at their own settings: 5 descent steps of 1e-4, then 8 of 1e-7 up."""
    names = ("group_action_MLP_two_layer", "group_action_MLP", "teleport_MLP")
    theirs = take("Symmetry-Teleportation/teleportation.py", *names)
    widths = [5, 6, 7, 8]

    def loss(ws: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        h = x
        for w in ws[:-1]:
            h = nn.LeakyReLU(SLOPE)(w @ h)
        return 0.5 * (ws[-1] @ h - y).square().sum()

    torch.manual_seed(seed**2 * 12345)
    ws = [torch.rand(b, a, requires_grad=True) for a, b in pairwise(widths)]
    x, y = torch.rand(5, 4), torch.rand(8, 4)
    for _ in range(5):
        grads = torch.autograd.grad(loss(ws, x, y), ws)
        ws = [(w - 1e-4 * g).detach().requires_grad_() for w, g in zip(ws, grads, strict=True)]
    before = float(loss(ws, x, y).detach())
    layers: list[nn.Module] = []
    for w in ws:
        layers += [nn.Linear(w.shape[1], w.shape[0], False), nn.LeakyReLU(SLOPE)]
        layers[-2].weight.data = w.detach().clone()
    moved = theirs(list(ws), x, y, 1e-7, [4, *widths], loss, step=8)
    model = nn.Sequential(*layers[:-1])
    report = SymmetryTeleporter(model, 8, 2e-7, max_drift=None).step(
        lambda: 0.5 * (model(x.mT).mT - y).square().sum()
    )
    assert float(loss(moved, x, y).detach()) < 0.9 * before
    assert report.drift < 1e-3 * before
    assert report.growth > 1.2


def test_the_planar_teleport_is_theirs() -> None:
    theirs = take("Symmetry-Teleportation/teleportation.py", "group_action_SO2", "teleport_SO2")
    start = torch.tensor([4.0, -2.0])

    def there(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Any]:
        return lambda a, b: tuple(function(torch.stack([a, b])))

    np.random.seed(3)  # noqa: NPY002 (theirs draws the first angle from it)
    angle = float(np.random.random() * np.pi)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    x, y = (c.clone().requires_grad_() for c in start)
    found = theirs(x, y, there(BOOTH.to_uv), there(BOOTH.from_uv),
                   lambda a, b: BOOTH(torch.stack([a, b])), 1e-5)  # fmt: skip
    # They return the point before the last of their ten updates of the angle.
    ours = so2_teleport(BOOTH, start, steps=9, lr=2e-5, angle=angle)
    torch.testing.assert_close(torch.stack(list(found)).detach(), ours, rtol=1e-4, atol=1e-4)


@given(seeds, st.sampled_from([0.5, 0.9, 0.97, 0.99]))
def test_the_rank_of_their_first_task_is_one_short(seed: int, tau: float) -> None:
    theirs = take("GPM/main_pmnist.py", "update_GPM")
    matrix = np.random.default_rng(seed).normal(size=(7, 12))
    kept: list[Any] = []
    theirs(None, [matrix], [tau], kept)
    values = torch.linalg.svdvals(torch.from_numpy(matrix))
    assert kept[0].shape[1] == energy_rank(values, tau) - 1


def test_a_change_of_basis_is_theirs_weight_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("networkx")
    folder = Path(str(ROOT)) / "neuralteleportation"
    if not folder.exists():
        pytest.skip(f"{folder} is missing")
    monkeypatch.setattr(np, "float", float, raising=False)  # gone from numpy since
    monkeypatch.syspath_prepend(str(folder))
    from neuralteleportation.layers.layer_utils import swap_model_modules_for_COB_modules
    from neuralteleportation.neuralteleportationmodel import NeuralTeleportationModel

    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2),
        )  # fmt: skip

    ours = network()
    wrapped = NeuralTeleportationModel(swap_model_modules_for_COB_modules(network()), (2, 1, 4, 4))
    wrapped.network.load_state_dict(ours.state_dict())  # the swap draws new weights
    factors = torch.rand(8) + 0.5
    wrapped.teleport(factors)
    ChangeOfBasisTeleporter(ours)._rescale([factors[:3], factors[3:]])
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(wrapped.network.get_parameter(name), parameter)
    for name in [m for m in sys.modules if m.startswith("neuralteleportation")]:
        del sys.modules[name]
