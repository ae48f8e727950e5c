"""Embeddings: one-hot rows, free unseen tokens, and tables that are also the output head."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import teleport
from teleport.layers.linear import TransposedLinearRule
from teleport.layers.one_hot import AxisBasis, AxisSpace
from teleport.layers.rule import rule_for
from teleport.layers.shared_weight import TiedBasis
from teleport.layers.support import cover, supported
from teleport.subspace import RowSpace
from tests.support.fingerprint import fingerprint
from tests.support.strategies import gradient, gradient_norm, seeds

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Lookup:
    size: int
    width: int
    padding: int | None
    shape: tuple[int, ...]
    seed: int

    def build(self) -> tuple[nn.Embedding, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = nn.Embedding(self.size, self.width, self.padding, dtype=torch.float64)
            nn.init.normal_(module.weight)
            return module, torch.randint(self.size, self.shape)


@st.composite
def lookups(draw: st.DrawFn) -> Lookup:
    size = draw(st.integers(1, 9))
    padding = draw(st.none() | st.integers(-size, size - 1))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    return Lookup(size, draw(st.integers(1, 4)), padding, shape, draw(seeds))


@given(lookups())
def test_rows_times_matrix_is_the_module(case: Lookup) -> None:
    module, x = case.build()
    (part,) = rule_for(module).parts(module)
    z = module(x)
    assert bool((part.rows(x) @ part.matrix().mT == part.out_rows(z)).all())
    assert bool((part.compute(x) == z).all())
    part.write(2 * part.matrix())
    assert bool((module(x) == 2 * z).all())


@pytest.mark.verifies("thm-span")
@given(lookups())
def test_the_weight_gradient_is_autograds(case: Lookup) -> None:
    module, x = case.build()
    (part,) = rule_for(module).parts(module)
    z = module(x)
    delta = torch.sin(torch.arange(z.numel(), dtype=torch.float64)).reshape(z.shape)
    (wanted,) = torch.autograd.grad((z * delta).sum(), [module.weight])
    (found,) = part.split(part.weight_gradient(x, delta))
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@given(lookups(), st.floats(0.05, 1.0))
def test_counting_tokens_is_decomposing_one_hot_rows(case: Lookup, tau: float) -> None:
    """`AxisSpace` against the general machinery, on the rows written out."""
    module, x = case.build()
    (part,) = rule_for(module).parts(module)
    axes, rows = AxisSpace(case.size), RowSpace()
    axes.add(x)
    rows.add(part.rows(x))
    energies = (part.rows(x) ** 2).sum(0)
    assume(len(energies[energies > 0].unique()) == int((energies > 0).sum()))  # no choice of axes
    shares = energies.sort(descending=True).values.cumsum(0) / energies.sum()
    assume(bool(((shares - tau).abs() > 1e-9).all()))  # the share is not met by rounding alone
    one, other = axes.basis(tau), rows.basis(tau)
    assert (one.rank, one.null_dim, one.shape) == (other.rank, other.null_dim, other.shape)
    assert one.residual == pytest.approx(other.residual, abs=1e-7)
    matrix = part.matrix()
    torch.testing.assert_close(one.project(matrix), other.project(matrix), rtol=0, atol=TOLERANCE)


@st.composite
def bags(draw: st.DrawFn) -> tuple[nn.EmbeddingBag, tuple[Any, ...]]:
    """A module of any mode and the arguments of a call; bags may be empty."""
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    size, padding = 7, draw(st.none() | st.integers(0, 6))
    last, flat = draw(st.booleans()), draw(st.booleans())
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(seeds))
        module = nn.EmbeddingBag(
            size, 3, mode=mode, padding_idx=padding, include_last_offset=last and flat,
            dtype=torch.float64,
        )  # fmt: skip
        nn.init.normal_(module.weight)
        if flat:
            tokens = torch.randint(size, (sum(counts),))
            offsets = torch.tensor([0, *counts]).cumsum(0)
            arguments: tuple[Any, ...] = (tokens, offsets if last else offsets[:-1])
        else:
            tokens = torch.randint(size, (len(counts), 3))
            arguments = (tokens, None)
        if mode == "sum" and draw(st.booleans()):
            arguments = (*arguments, torch.randn(tokens.shape, dtype=torch.float64))
    return module, arguments


@given(bags())
def test_a_bag_written_with_lookups_is_the_modules(
    case: tuple[nn.EmbeddingBag, tuple[Any, ...]],
) -> None:
    module, arguments = case
    assume(arguments[0].numel())
    rule = rule_for(module)
    (part,) = rule.parts(module)
    out = rule.forward(module, lambda name, x: functional.embedding(x, module.weight), *arguments)
    wanted = module(*arguments)
    torch.testing.assert_close(out, wanted, rtol=0, atol=TOLERANCE)

    calls: list[tuple[Tensor, Tensor]] = []

    def product(name: str, x: Tensor) -> Tensor:
        z = part.compute(x).detach().requires_grad_()
        calls.append((x, z))
        return z

    rule.forward(module, product, *arguments).sin().sum().backward()
    ((x, z),) = calls
    (by_module,) = torch.autograd.grad(wanted.sin().sum(), [module.weight])
    delta = torch.zeros_like(z) if z.grad is None else z.grad
    (found,) = part.split(part.weight_gradient(x, delta))
    torch.testing.assert_close(found, by_module, rtol=0, atol=TOLERANCE)


def test_a_flat_bag_needs_offsets() -> None:
    model = nn.EmbeddingBag(5, 2)
    with pytest.raises(ValueError, match="offsets"):
        rule_for(model).forward(model, lambda name, x: x, torch.tensor([1, 2]))


@pytest.mark.parametrize("setting", ["max_norm", "scale_grad_by_freq"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_settings_that_change_weight_or_gradient_are_named(kind: Any, setting: str) -> None:
    model = nn.Sequential(kind(5, 4, **{setting: 1.0}), nn.Linear(4, 4))
    assert setting in supported(model).frozen["0"]


class Language(nn.Module):
    """Embedding, a mixing layer and a head; with ``tied`` the head is the embedding's table.

    The hidden layer has more units than the batch has tokens, the head more rows than the batch
    has kinds of token.
    """

    def __init__(
        self,
        tied: bool = True,
        bias: bool = False,
        padding: int | None = None,
        transposed: bool = False,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12, padding_idx=padding, sparse=sparse)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x).cumsum(-2))))


WORDS = 11


@dataclass(frozen=True)
class Text:
    model: Language
    x: Tensor

    def closure(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x)[:-1], self.x[1:])

    def halves(self) -> list[Any]:
        """The same loss and tokens in two closures: by the parity of the predicted position."""
        return [lambda k=k: self._half(k) for k in (0, 1)]

    def _half(self, k: int) -> Tensor:
        logits, targets = self.model(self.x)[:-1][k::2], self.x[1:][k::2]
        return functional.cross_entropy(logits, targets)


def text(seed: int, kinds: int = 6, length: int = 7, **settings: Any) -> Text:
    """Tokens of which ``WORDS - kinds`` are never used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Language(**settings).double()
        used = torch.randperm(WORDS)[:kinds]
        return Text(model, used[torch.randint(kinds, (length,))])


settings = st.fixed_dictionaries(
    {"bias": st.booleans(), "padding": st.none() | st.integers(0, WORDS - 1)}
)


@pytest.mark.verifies("thm-invariance", "thm-layerwise")
@given(seeds, settings)
def test_a_tied_table_moves_and_keeps_loss_outputs_and_seen_rows(
    seed: int, settings: dict[str, Any]
) -> None:
    case = text(seed, **settings)
    before = [p.detach().clone() for p in case.model.parameters()]
    outputs = case.model(case.x).detach()
    report = teleport.Teleporter(case.model, growth=1.5).step(case.closure)
    assert not report.rolled_back, report.reason
    assert report.growth == pytest.approx(1.5, rel=1e-9)
    moved = {layer.name: layer.move_norm for layer in report.layers}
    assert moved["embed"] > 1e-6
    torch.testing.assert_close(case.model(case.x), outputs, rtol=0, atol=1e-9)
    seen = case.x.unique()
    assert bool((case.model.embed.weight[seen] == before[0][seen]).all())
    assert gradient_norm(case.model, case.closure) == pytest.approx(report.grad_norm_after)


@pytest.mark.verifies("thm-survivor")
@pytest.mark.parametrize("parts", [1, 2])
@given(seeds, settings)
def test_the_tangent_direction_of_a_tied_table_is_double_backwards(
    parts: int, seed: int, settings: dict[str, Any]
) -> None:
    ends = []
    for method in ("tangent", "double_backward"):
        case = text(seed, **settings)
        closures = [case.closure] if parts == 1 else case.halves()
        report = teleport.Teleporter(case.model, growth=1.2, method=method).step(closures)
        assert report.steps == 1
        ends.append([p.detach() for p in case.model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@given(seeds, settings)
def test_two_halves_are_one_batch_for_a_tied_table(seed: int, settings: dict[str, Any]) -> None:
    whole, halves = text(seed, **settings), text(seed, **settings)
    teleport.Teleporter(whole.model, growth=1.5).step(whole.closure)
    teleport.Teleporter(halves.model, growth=1.5).step(halves.halves())
    pairs = zip(whole.model.parameters(), halves.model.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_one_constraint_alone_does_not_keep_the_loss() -> None:
    """Either side of the projection is needed: without it the same move changes the outputs."""
    case = text(0)
    (block,) = [b for b in cover(case.model).blocks if b.name == "embed"]
    space = teleport.null_space(case.model, [case.closure]).bases["embed"]
    assert isinstance(space, TiedBasis)
    move, outputs = torch.randn(WORDS, 12, dtype=torch.float64), case.model(case.x).detach()
    start = block.part.matrix()
    projections = {
        "both": space.project(move),
        "rows": space.own.project(move),
        "tokens": space.other.project(move.mT).mT,
    }
    changes = {}
    for name, projected in projections.items():
        assert float(projected.norm()) > 0.1
        block.part.write(start + projected)
        changes[name] = float((case.model(case.x) - outputs).abs().max())
    assert changes["both"] < 1e-12
    assert min(changes["rows"], changes["tokens"]) > 1e-3


@pytest.mark.verifies("thm-layerwise")
@given(seeds)
def test_the_tied_projection_is_the_orthogonal_one(seed: int) -> None:
    case = text(seed, bias=True)
    space = teleport.null_space(case.model, [case.closure]).bases["embed"]
    torch.manual_seed(seed)
    one, other = torch.randn(2, WORDS, 13, dtype=torch.float64)
    projected = space.project(one)
    torch.testing.assert_close(space.project(projected), projected, rtol=0, atol=1e-10)
    left, right = (projected * other).sum(), (one * space.project(other)).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_where_every_token_is_used_a_tied_table_has_no_room() -> None:
    case = Text(text(0, bias=True).model, torch.arange(WORDS))
    assert teleport.null_space(case.model, [case.closure]).bases["embed"].own.null_dim > 0
    report = teleport.Teleporter(case.model).step(case.closure)
    (line,) = [layer for layer in report.layers if layer.name == "embed"]
    assert line.null_dim == 0
    assert line.status == "full rank: no null space"


@pytest.mark.slow
@given(seeds)
def test_below_tau_1_a_tied_table_drifts_within_its_bounds(seed: int) -> None:
    case = text(seed)
    space = teleport.null_space(case.model, [case.closure], tau=0.7)
    report = teleport.Teleporter(case.model, tau=0.7, growth=1.3, max_drift=1e9).step(case.closure)
    (line,) = [layer for layer in report.layers if layer.name == "embed"]
    assert line.rank == space.bases["embed"].rank
    if line.move_norm:
        assert line.output_bound == pytest.approx(line.move_norm * space.bases["embed"].residual)


def test_an_embedding_of_its_own_is_a_fixed_point() -> None:
    case = text(0, tied=False)
    for method in ("tangent", "double_backward"):
        before = case.model.embed.weight.detach().clone()
        report = teleport.Teleporter(case.model, method=method).step(case.closure)
        (line,) = [layer for layer in report.layers if layer.name == "embed"]
        assert line.status == "fixed point"
        assert bool((case.model.embed.weight == before).all())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.verifies("thm-keep")
@given(seeds)
def test_new_words_are_learned_and_old_text_reads_as_before(
    tied: bool, sparse: bool, seed: int
) -> None:
    """Projected gradients: rows of the table that only new text uses are free."""
    case = text(seed, tied=tied, sparse=sparse and not tied)
    outputs = case.model(case.x).detach()
    space = teleport.null_space(case.model, [case.closure])
    unseen = sorted(set(range(WORDS)) - set(case.x.tolist()))
    new = Text(case.model, torch.tensor(unseen + unseen))
    table = case.model.embed.weight.detach().clone()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=5e-3)
    first = float(new.closure())
    for _ in range(5):
        optimizer.zero_grad()
        new.closure().backward()
        space.project_(case.model)
        assert case.model.embed.weight.grad.is_sparse == (sparse and not tied)
        optimizer.step()
    assert float(new.closure()) < first
    torch.testing.assert_close(case.model(case.x), outputs, rtol=0, atol=1e-9)
    assert float((case.model.embed.weight - table)[unseen].abs().max()) > 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_spaces_with_embeddings_merge_save_and_load(tied: bool, tmp_path: Path) -> None:
    one, two = text(0, tied=tied), text(3, tied=tied)
    both = Text(one.model, torch.cat([one.x, two.x]))
    first, second = (
        teleport.null_space(one.model, [lambda x=x: one.model(x)]) for x in (one.x, two.x)
    )
    merged = first.merge(second)
    merged.save(tmp_path / "space")
    loaded = teleport.NullSpace.load(tmp_path / "space")
    assert type(loaded.bases["embed"]) is (TiedBasis if tied else AxisBasis)
    move = torch.randn(WORDS, 12, dtype=torch.float64)
    move = move if tied else move.T
    found = loaded.bases["embed"].project(move)
    torch.testing.assert_close(found, merged.bases["embed"].project(move), rtol=0, atol=0)
    unseen = sorted(set(range(WORDS)) - set(both.x.tolist()))
    free = found[unseen] if tied else found[:, unseen]
    assert float(free.norm()) > 0
    assert float(found.norm()) == pytest.approx(float(free.norm()))


def test_a_bag_model_keeps_old_bags() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 3)).double()
    old, new = torch.randint(10, (4, 5)), torch.randint(10, 30, (4, 5))
    space = teleport.null_space(model, [lambda: model(old)])
    outputs, table = model(old).detach(), model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with space.keep(model):
        model(new).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model(old), outputs, rtol=0, atol=1e-10)
    assert bool((model[0].weight[10:] != table[10:]).any())


def test_a_table_and_two_heads_are_frozen() -> None:
    """Two heads with biases of their own have no common matrix."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "one": nn.Linear(4, 5), "two": nn.Linear(4, 5)}
    )
    for name in ("one", "two"):
        model[name].weight = model["embed"].weight
    assert set(supported(model).frozen) == {"embed", "one", "two"}


def test_a_transposed_layer_ties_without_a_bias_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposed(nn.Module):
        def __init__(self, weight: nn.Parameter, bias: bool) -> None:
            super().__init__()
            self.weight = weight
            self.bias = nn.Parameter(torch.zeros(weight.shape[1]).double()) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            z = x @ self.weight
            return z if self.bias is None else z + self.bias

    monkeypatch.setitem(teleport.layers.RULES, Transposed, TransposedLinearRule())
    torch.manual_seed(0)
    for bias in (False, True):
        code = nn.Linear(9, 12).double()
        model = nn.Sequential(
            nn.Linear(9, 9).double(), code, nn.Tanh(), Transposed(code.weight, bias)
        )
        assert supported(model).moves == (["0"] if bias else ["0", "1"])
        x = torch.randn(4, 9).double()

        def closure(model: nn.Module = model, x: Tensor = x) -> Tensor:
            return functional.mse_loss(model(x), x)

        ends = []
        for method in ("tangent", "double_backward"):
            twin = copy.deepcopy(model)
            report = teleport.Teleporter(twin, growth=1.3, method=method).step(
                lambda twin=twin: closure(twin)
            )
            if not bias:
                assert report.growth == pytest.approx(1.3)
                assert float((twin(x) - model(x)).abs().max()) < 1e-9
                ends.append(gradient(twin, lambda twin=twin: closure(twin)))
        for one, other in zip(*ends, strict=True) if ends else ():
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_failed_step_leaves_a_tied_model_as_it_was() -> None:
    case = text(0)
    before = fingerprint(case.model)
    report = teleport.Teleporter(case.model, max_drift=0.0, growth=5.0).step(case.closure)
    assert report.rolled_back or report.loss_before == report.loss_after
    if report.rolled_back:
        assert fingerprint(case.model) == before


def test_tokens_of_every_space_are_counted_or_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        AxisSpace(3).basis()
    with pytest.raises(ValueError, match="tau"):
        AxisSpace(3).basis(0.0)
    one = AxisSpace(3)
    one.add(torch.tensor([0, 0, 2]))
    rows = RowSpace()
    rows.add(torch.eye(3))
    with pytest.raises(TypeError):
        one.basis().merge(rows.basis())
    with pytest.raises(TypeError):
        rows.basis().merge(one.basis())
