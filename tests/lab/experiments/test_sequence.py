"""Mamba and TTT-Linear: each is its literal formula, and teleports as the theorems say."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import Teleporter, TeleportReport, data, null_space, reference, supported
from teleport.lab.experiments.sequence import Mamba, SequenceNetwork, TTTLinear, selective_scan
from teleport.lab.experiments.table import find_experiment
from tests.support.examples import examples
from tests.support.strategies import seeds

few = examples(10)
fewer = examples(5)
BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "mamba": partial(Mamba, state=3),
    "ttt": partial(TTTLinear, inner_batch=4),
}


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


# ---- the blocks are their formulas


@few
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_the_scan_is_its_recurrence_number_by_number(
    seed: int, channels: int, states: int, tokens: int
) -> None:
    x, step = drawn(seed, tokens, channels), drawn(seed + 1, tokens, channels).exp()
    a, (b, c) = -drawn(seed + 2, channels, states).exp(), drawn(seed + 3, 2, tokens, states)
    found = selective_scan(x[None], step[None], a, b[None], c[None])[0]
    for d in range(channels):
        h = [0.0] * states
        for t in range(tokens):
            for s in range(states):
                decay = (step[t, d] * a[d, s]).exp()
                h[s] = decay * h[s] + step[t, d] * b[t, s] * x[t, d]
            y = sum(c[t, s] * h[s] for s in range(states))
            assert torch.allclose(found[t, d], y, atol=1e-12)


@few
@given(seeds, st.integers(1, 6), st.integers(1, 4), st.integers(1, 6))
def test_mamba_is_its_formula_token_by_token(
    seed: int, width: int, kernel: int, tokens: int
) -> None:
    block = made(lambda: Mamba(width, 2, kernel=kernel), seed)
    rows = drawn(seed, 1, tokens, width)
    x, z = block.in_proj(rows)[0].chunk(2, dim=-1)
    before = torch.cat([x.new_zeros(kernel - 1, x.shape[1]), x])
    taps, bias = block.conv.weight[:, 0], block.conv.bias
    x = torch.stack([(taps * before[t : t + kernel].T).sum(1) + bias for t in range(tokens)])
    x = x * x.sigmoid()
    dt, b, c = block.x_proj(x).split([block.rank, 2, 2], dim=-1)
    step = torch.log1p(block.dt_proj(dt).exp())
    y = selective_scan(x[None], step[None], -block.A_log.exp(), b[None], c[None])[0]
    y = y + block.D * x
    assert torch.allclose(block(rows)[0], block.out_proj(y * z * z.sigmoid()), atol=1e-10)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_ttt_is_gradient_descent_on_its_inner_loss(
    seed: int, width: int, size: int, tokens: int
) -> None:
    """The inner steps by autograd, on the matrix itself."""
    block = made(lambda: TTTLinear(width, size), seed)
    rows = drawn(seed, 1, tokens, width)
    q, k = (functional.normalize(view(rows)[0], dim=-1) for view in (block.q, block.k))
    v, rate = block.v(rows)[0], block.rate(rows)[0].sigmoid()
    learned = block.start.weight
    for t in range(tokens):
        if t % size == 0:
            batch = learned
        inner = lambda w, t=t: (rate[t] * (w @ k[t] - v[t]).square().sum()).sum() / size  # noqa: E731
        learned = learned - torch.autograd.functional.jacobian(inner, batch)
        assert torch.allclose(block(rows)[0, t], block.out(learned @ q[t]), atol=1e-10)


@given(seeds, st.sampled_from(sorted(BLOCKS)), st.integers(2, 9), st.data())
@few
def test_no_token_sees_a_later_one(seed: int, name: str, tokens: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, tokens - 1))
    block, rows = made(lambda: BLOCKS[name](6), seed), drawn(seed, 1, tokens, 6)
    changed = rows.clone()
    changed[:, place] += 1
    moved = (block(rows) - block(changed))[0].abs().amax(dim=1) > 1e-9
    assert not moved[:place].any()
    assert moved[place]


def test_ttt_stays_bounded_on_a_thousand_equal_tokens() -> None:
    """Where the keys of a batch are equal, its step is longest; rates are drawn up to their 2."""
    block = made(lambda: TTTLinear(8), 0)
    block.rate.bias.data.fill_(30.0)
    rows = drawn(0, 1, 1, 8).expand(1, 1000, 8)
    assert block(rows).abs().max() < 10


def test_an_unknown_readout_is_refused() -> None:
    with pytest.raises(ValueError, match="mean"):
        SequenceNetwork(2, 3, TTTLinear, readout="first")


# ---- what moves


def network(name: str, seed: int = 0, width: int = 12, readout: str = "mean") -> nn.Module:
    make = partial(SequenceNetwork, 3, 2, BLOCKS[name], width, 2, readout)
    return made(make, seed)


MOVE = {
    "mamba": ("in_proj", "conv", "x_proj", "dt_proj", "out_proj"),
    "ttt": ("q", "k", "v", "out", "start", "rate"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_matrix_can_move_and_what_stays_is_named(name: str) -> None:
    found = supported(network(name))
    inner = {f"blocks.{i}.1.{part}" for i in (0, 1) for part in MOVE[name]}
    assert set(found.moves) == {"embed", "head", *inner}
    norms = {"norm", "blocks.0.0", "blocks.1.0"}
    scans = {"blocks.0.1", "blocks.1.1"} if name == "mamba" else set()
    assert set(found.frozen) == norms | scans


def test_a_diagonal_and_a_filter_per_channel_leave_nothing_free() -> None:
    """Each channel of the convolution has its taps and a bias; enough tokens fill all five."""
    model, x = network("mamba"), drawn(0, 3, 7, 3)
    bases = null_space(model, [lambda: model(x)]).bases
    assert [bases[f"blocks.{i}.1.conv"].null_dim for i in (0, 1)] == [0, 0]
    assert [bases[f"blocks.{i}.1.dt_proj"].null_dim for i in (0, 1)] == [0, 0]
    assert bases["blocks.1.1.in_proj"].null_dim == 1, "what the LayerNorm leaves"


@few
@given(seeds, st.integers(2, 9))
def test_without_a_bias_the_layer_norms_direction_lasts_while_its_shift_is_balanced(
    seed: int, width: int
) -> None:
    """The original Mamba's in_proj: 1/γ is orthogonal to all tokens only if Σ β/γ = 0."""
    model = made(lambda: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3, bias=False)), seed)
    x, scale, shift = drawn(seed, 4 * width, width), drawn(seed + 1, width), drawn(seed + 2, width)
    with torch.no_grad():
        model[0].weight.copy_(scale.exp())
        for added, free in ((0.0, 1), (1.0, 0)):
            balanced = shift - scale.exp() * (shift / scale.exp()).mean()
            model[0].bias.copy_(balanced + added)
            assert null_space(model, [lambda: model(x)]).bases["1"].null_dim == free


def columns(rows: Tensor) -> Tensor:
    return functional.pad(rows.detach().flatten(0, -2), (0, 1), value=1.0).T


@pytest.mark.verifies("thm-survivor", "thm-fast-weights")
@fewer
@given(seeds, st.sampled_from(sorted(BLOCKS)), st.integers(2, 5), st.sampled_from(["mean", "last"]))
def test_a_step_is_the_papers_equations_literally(
    seed: int, name: str, tokens: int, readout: str
) -> None:
    """∇T by double backward, equation 10 on the rows of every call, equations 3, 11 and 5."""
    model, (x, y) = network(name, seed, 10, readout), (drawn(seed, 2, tokens, 3), drawn(seed, 2, 2))
    closure = lambda: functional.mse_loss(model(x), y)  # noqa: E731
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inputs: dict[str, list[Tensor]] = {n: [] for n in linear}
    hooks = [
        m.register_forward_pre_hook(lambda _, given, n=n: inputs[n].append(given[0]))
        for n, m in linear.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    weights = list(model.parameters())
    first = torch.autograd.grad(closure(), weights, create_graph=True)
    ascent = torch.autograd.grad(sum(g.square().sum() for g in first) / 2, weights)
    by_name = dict(zip(dict(model.named_parameters()), ascent, strict=True))
    expected = {}
    for n, module in linear.items():
        gradient = by_name[f"{n}.weight"]
        rows = torch.cat([columns(given).T for given in inputs[n]])
        if module.bias is None:
            rows = rows[:, :-1]
        else:
            gradient = torch.cat([gradient, by_name[f"{n}.bias"][:, None]], dim=1)
        basis = reference.significant_basis(reference.equation_10([rows]), 1.0)
        expected[n] = 1e-3 * reference.equation_11(gradient, basis)
    before = {n: _matrix(m) for n, m in linear.items()}
    Teleporter(model, lr=1e-3, steps=1).step(closure)
    total = sum(float(move.norm()) for move in expected.values())
    for n, module in linear.items():
        assert (_matrix(module) - before[n] - expected[n]).norm() <= 1e-9 * (total + 1e-3), n


def _matrix(module: nn.Module) -> Tensor:
    pieces = [module.weight] if module.bias is None else [module.weight, module.bias[:, None]]
    return torch.cat(pieces, dim=1).detach().clone()


@fewer
@given(seeds, st.sampled_from(sorted(BLOCKS)), st.integers(2, 9), st.sampled_from(["mean", "last"]))
def test_both_methods_reach_the_growth_at_the_same_parameters(
    seed: int, name: str, tokens: int, readout: str
) -> None:
    x, y = drawn(seed, 2, tokens, 3), drawn(seed, 2, 2)
    ends = []
    for method in ("tangent", "double_backward"):
        model = network(name, seed, readout=readout)
        outputs = model(x).detach()
        closure = lambda model=model: functional.mse_loss(model(x), y)  # noqa: E731
        report = Teleporter(model, growth=1.5, method=method).step(closure)
        assert report.growth == pytest.approx(1.5, rel=1e-6)
        assert torch.allclose(model(x), outputs, atol=1e-9)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 1e-8 * ends[0].norm()


# ---- real data


def teleported(name: str, include: list[str] | None = None) -> TeleportReport:
    """A teleport of an experiment's network at its initial values, on 32 examples."""
    experiment = find_experiment(name)
    if not os.environ.get(data.ROOT_VARIABLE):
        pytest.skip(f"needs {experiment.data}: set {data.ROOT_VARIABLE}")
    (info,) = (info for info in data.available() if info.name == experiment.data)
    if info.how:
        pytest.skip(f"needs {experiment.data}: {info.how}")
    dataset = data.load(experiment.data)
    torch.manual_seed(0)
    model = experiment.build(dataset, experiment.presets["cpu"])

    def loss(first: int) -> Tensor:
        some = slice(first, first + 32)
        inputs = dataset.prepare(dataset.train_inputs[some])
        return dataset.loss(model(inputs), dataset.train_targets[some])

    return Teleporter(model, include=include).step(lambda: loss(0), held_out=lambda: loss(1000))


P = 7
"""Variables of ETTh1. The rows of the first block lie in P + 2 dimensions, whatever the data.

The embedding makes P + 1, LayerNorm's shift and the 1 for the bias add one.
"""
RANKS = {
    "mamba-etth1": {"in_proj": P + 2},
    "ttt-etth1": {"q": P + 2, "k": P + 2, "v": P + 2, "rate": P + 2, "start": 2 * (P + 2)},
}


@pytest.mark.parametrize("name", RANKS)
def test_on_etth1_a_default_teleport_keeps_the_loss_and_reaches_the_growth(name: str) -> None:
    """32 weeks of hours, in single precision."""
    report = teleported(name)
    assert not report.rolled_back, report
    assert report.growth == pytest.approx(1.5, rel=0.01)
    assert report.drift <= report.tolerance
    moved = {layer.name.split(".")[-1]: layer for layer in report.layers if layer.status == "moved"}
    assert {part: moved[part].rank for part in RANKS[name]} == RANKS[name]
    assert set(moved) - set(RANKS[name]) <= {"out", "head"}
    if "out" in moved:  # values, what W_0 says to keys and to queries, and the bias
        assert moved["out"].rank <= 3 * (P + 2) + 1


@pytest.mark.parametrize("name", RANKS)
def test_on_etth1_what_poor_tokens_leave_is_free_on_all_data(name: str) -> None:
    report = teleported(name, include=[f"*.{part}" for part in RANKS[name]])
    assert report.growth == pytest.approx(1.5, rel=0.01)
    assert report.held_out_drift <= 1e-5 * report.held_out_before
