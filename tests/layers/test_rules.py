"""Layer rules: one normal form ``z = rows @ matrix.T`` for every registered layer."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport.layers.linear import LinearRule, TransposedLinearRule
from teleport.layers.part import DenseMap, LinearMap, ParameterSlice
from teleport.layers.rule import RULES, LayerRule, register, rule_for
from tests.support.drawn_layers import Layer, convolutions, linears, transposed_convolutions
from tests.support.strategies import seeds

TOLERANCE = 1e-12
"""Sums of at most a few hundred products of numbers of size 1, in float64."""


def call(module: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch: 'same' padding of an even kernel copies its input
        warnings.simplefilter("ignore", UserWarning)
        return module(x)


layers = st.one_of(linears(), convolutions(), transposed_convolutions())


def constant(part: LinearMap, like: Tensor) -> Tensor:
    """The bias that does not move, in rows."""
    if part.has_bias_column or part.bias is None:
        return torch.zeros(1, dtype=torch.float64)
    bias = part.bias.parameter.detach()
    return bias if like.dim() == 2 else bias.reshape(len(like), 1, -1)


@given(layers)
def test_output_is_rows_times_matrix(case: Layer) -> None:
    module, part, x = case.build()
    wanted = part.out_rows(call(module, x))
    found = part.rows(x) @ part.matrix().mT + constant(part, wanted)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE


@given(layers)
def test_a_part_computes_what_its_module_does(case: Layer) -> None:
    module, part, x = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert torch.equal(part.compute(x), module(x))


@pytest.mark.verifies("thm-span")
@given(layers)
def test_weight_gradient_is_cotangent_rows_times_input_rows(case: Layer) -> None:
    module, part, x = case.build()
    z = call(module, x)
    delta = torch.randn_like(z)
    parameters = [slot.parameter for slot in part.slots]
    wanted = part.join(torch.autograd.grad(z, parameters, delta))
    assert (part.weight_gradient(x, delta) - wanted).abs().max() <= TOLERANCE
    assert (part.out_rows(delta).mT @ part.rows(x) - wanted).abs().max() <= TOLERANCE


@pytest.mark.verifies("thm-survivor")
@given(layers)
def test_weight_gradient_on_tangents_has_no_bias(case: Layer) -> None:
    module, part, x = case.build()
    delta = torch.randn_like(call(module, x))
    found = part.weight_gradient(x, delta, bias_input=0.0)
    wanted = part.out_rows(delta).mT @ part.rows(x, bias_input=0.0)
    assert (found - wanted).abs().max() <= TOLERANCE


@given(layers)
def test_split_undoes_join_and_write_undoes_matrix(case: Layer) -> None:
    _, part, _ = case.build()
    matrix = part.matrix()
    pieces = part.split(matrix)
    assert all(torch.equal(p, s.of(s.parameter)) for p, s in zip(pieces, part.slots, strict=True))
    part.write(matrix + 1.0)
    assert torch.equal(part.matrix(), matrix + 1.0)
    change = part.split(torch.ones_like(matrix).requires_grad_())  # of some graph, which ends here
    part.put(pieces, [(change, 1.0), (change, 2.0)], noticed=False)
    assert torch.equal(part.matrix(), matrix + 1.0 + 2.0)
    assert all(slot.parameter.is_leaf for slot in part.slots)


@given(layers)
def test_the_matrix_is_a_copy(case: Layer) -> None:
    module, part, _ = case.build()
    before = module.weight.detach().clone()
    part.matrix().add_(1.0)
    assert torch.equal(module.weight, before)


@given(layers)
def test_out_rows_are_undone(case: Layer) -> None:
    module, part, x = case.build()
    z = call(module, x).detach()
    assert torch.equal(part.from_out_rows(part.out_rows(z), z), z)


@given(layers)
def test_push_is_the_derivative_of_the_layer(case: Layer) -> None:
    module, part, x = case.build()
    x_dot, pieces = torch.randn_like(x), part.pieces()
    wanted = call(module, x + x_dot) - call(module, x)  # exact: the layer is affine
    assert (part.push(x_dot, pieces[0]) - wanted).abs().max() <= TOLERANCE
    z = torch.randn_like(wanted)
    added, found = z + wanted, part.push_onto(z, x_dot, pieces[0])
    assert found is z
    assert (found - added).abs().max() <= TOLERANCE
    if part.has_bias_column or part.bias is None:
        like = call(module, x)
        assert (part.push_affine(x, pieces, like) - like).abs().max() <= TOLERANCE


@given(layers)
def test_pull_is_the_adjoint_of_push(case: Layer) -> None:
    module, part, x = case.build()
    delta, weight = torch.randn_like(call(module, x)), part.pieces()[0]
    pulled = part.pull(delta, weight, x)
    assert pulled.shape == x.shape
    assert abs((part.push(x, weight) * delta).sum() - (x * pulled).sum()) <= 100 * TOLERANCE
    assert (LinearMap.pull(part, delta, weight, x) - pulled).abs().max() <= TOLERANCE


@given(layers)
def test_what_avoids_the_rows_and_the_matrix_agrees_with_them(case: Layer) -> None:
    """Norms, weight gradient and chunks, which the layers compute in ways of their own."""
    module, part, x = case.build()
    delta, pieces = torch.randn_like(call(module, x)), part.pieces()
    for bias_input in (0.0, 1.0):
        wanted = part.out_rows(delta).mT @ part.rows(x, bias_input)
        found = part.weight_gradient(x, delta, bias_input)
        assert (found - wanted).abs().max() <= TOLERANCE
    assert (part.row_norms(x) - part.rows(x).norm(dim=-1)).abs().max() <= TOLERANCE
    assert (part.out_norms(pieces) - part.matrix().norm(dim=-1)).abs().max() <= TOLERANCE
    weights = torch.rand(part.matrix_shape[:-1], dtype=delta.dtype)
    wanted = (part.out_rows(delta) * weights[..., None, :]).norm(dim=-1)
    assert (part.weighted_norms(delta, weights) - wanted).abs().max() <= TOLERANCE
    some = torch.zeros_like(x)
    some.view(-1)[[len(x) // 2, -1]] = 1.0  # the last entry is one of the last sample
    assert torch.equal(part.live(some), (part.rows(some) != 0).any(dim=-2))
    assert part.matrix().shape == part.matrix_shape
    assert torch.equal(torch.cat([part.rows(c) for c in part.chunks(x)], dim=-2), part.rows(x))


@given(layers)
def test_bias_column_is_zero_in_tangents(case: Layer) -> None:
    _, part, x = case.build()
    rows, tangents = part.rows(x), part.rows(x, bias_input=0.0)
    width = rows.shape[-1] - part.has_bias_column
    assert part.has_bias_column == (case.settings["bias"] and not case.frozen_bias)
    assert torch.equal(tangents[..., :width], rows[..., :width])
    assert bool((rows[..., width:] == 1).all())
    assert bool((tangents[..., width:] == 0).all())


@given(convolutions(), st.data())
def test_groups_never_mix(case: Layer, data: st.DataObject) -> None:
    """Changing the input channels of one group changes the rows and outputs of no other."""
    module, part, x = case.build()
    groups = module.groups
    one = data.draw(st.integers(0, groups - 1))
    channels = x.movedim(-module.weight.dim() + 1, 0)
    channels.chunk(groups)[one].add_(1.0)
    changed = channels.movedim(0, -module.weight.dim() + 1)
    _, _, original = case.build()
    if groups > 1:
        same = [g for g in range(groups) if g != one]
        assert torch.equal(part.rows(changed)[same], part.rows(original)[same])
        assert not torch.equal(part.rows(changed)[one], part.rows(original)[one])


def plain(module: nn.Module) -> Any:
    """The module's forward pass as its rule writes it, every product computed as it stands."""
    rule = rule_for(module)
    parts = {part.name: part for part in rule.parts(module)}
    return lambda *args, **kwargs: rule.forward(
        module, lambda name, x: parts[name].compute(x), *args, **kwargs
    )


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    if wanted is None or found is None:
        return found is wanted
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= TOLERANCE)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, dict[str, Any]]:
    """A module and the arguments of a call; every query may see at least one key."""
    heads = draw(st.integers(1, 2))
    width, batch_first = heads * draw(st.integers(2, 3)), draw(st.booleans())
    kdim, vdim = draw(st.sampled_from([(None, None), (3, 5)]))
    flags = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn")}
    samples, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 3
    batched, weighted = draw(st.booleans()), draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(seeds))
        module = nn.MultiheadAttention(
            width, heads, kdim=kdim, vdim=vdim, batch_first=batch_first, **flags
        ).double()

        def tokens(count: int, features: int) -> Tensor:
            lead = [samples, count] if batch_first else [count, samples]
            return torch.randn(*(lead if batched else [count]), features).double()

        arguments = {
            "query": tokens(queries, width),
            "key": tokens(keys, kdim or width),
            "value": tokens(keys, vdim or width),
            "need_weights": weighted,
            "average_attn_weights": draw(st.booleans()),
        }
        hidden = torch.rand(queries, keys) < 0.5
        hidden[:, 0] = False
        many = ((samples if batched else 1) * heads, queries, keys)
        masks = [None, hidden, torch.randn(queries, keys).double(), torch.randn(many).double()]
        mask = draw(st.sampled_from(range(4)))
        arguments["attn_mask"] = masks[mask]
        if draw(st.booleans()) and mask < 2:
            padding = torch.zeros(*([samples] if batched else []), keys, dtype=torch.bool)
            padding[..., -1] = True
            arguments["key_padding_mask"] = padding
    return module, arguments


@given(attentions())
def test_attention_written_in_parts_is_the_modules(
    case: tuple[nn.MultiheadAttention, dict[str, Any]],
) -> None:
    module, arguments = case
    assert same(plain(module)(**arguments), module(**arguments))


@st.composite
def recurrents(draw: st.DrawFn) -> tuple[nn.Module, tuple[Any, ...]]:
    kind = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
    settings: dict[str, Any] = {
        name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")
    }
    settings["num_layers"] = draw(st.integers(1, 2))
    if kind is nn.RNN:
        settings["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind is nn.LSTM and draw(st.booleans()):
        settings["proj_size"] = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(seeds))
        module = kind(3, 4, **settings).double()
        samples, steps = 2, draw(st.integers(1, 3))
        batched = draw(st.booleans())
        lead = (
            ([samples, steps] if module.batch_first else [steps, samples]) if batched else [steps]
        )
        x = torch.randn(*lead, 3).double()
        count = module.num_layers * (2 if module.bidirectional else 1)
        middle = [samples] if batched else []
        hidden = torch.randn(count, *middle, module.proj_size or 4).double()
        memory = torch.randn(count, *middle, 4).double()
        state = (hidden, memory) if kind is nn.LSTM else hidden
    return module, (x, state) if draw(st.booleans()) else (x,)


@given(recurrents())
def test_recurrence_written_in_parts_is_the_modules(case: tuple[nn.Module, Any]) -> None:
    module, arguments = case
    assert same(plain(module)(*arguments), module(*arguments))


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_cells_written_in_parts_are_the_modules(kind: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = kind(3, 4).double(), torch.randn(shape).double()
    state = module(x)
    assert same(plain(module)(x), state)
    assert same(plain(module)(x, state), module(x, state))


def test_bilinear_written_in_parts_is_the_modules() -> None:
    torch.manual_seed(0)
    module = nn.Bilinear(3, 4, 5).double()
    x, y = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 4).double()
    assert same(plain(module)(x, y), module(x, y))


def test_a_transposed_linear_layer_is_read_upright() -> None:
    class Conv1D(nn.Module):
        """As Hugging Face's: the weight is stored as [in, out]."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2).double())
            self.bias = nn.Parameter(torch.randn(2).double())

    module, x = Conv1D(), torch.randn(5, 3).double()
    (part,) = TransposedLinearRule().parts(module)
    assert same(part.rows(x) @ part.matrix().T, x @ module.weight + module.bias)
    part.write(2 * part.matrix())
    assert same(part.compute(x), x @ module.weight + module.bias)


def test_subclasses_have_no_rule() -> None:
    """They may compute something else, and a wrong rule would leave the level set."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert rule_for(Doubled(2, 2)) is None
    assert isinstance(rule_for(nn.Linear(2, 2)), LinearRule)


def test_register_adds_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x) * (x @ self.weight.T)

    monkeypatch.setitem(RULES, Gated, LinearRule())  # registers the clean-up

    @register(Gated)
    class GatedRule(LayerRule[Gated]):
        kind = "Gated"

        def parts(self, module: Gated) -> list[LinearMap]:
            return [DenseMap("", ParameterSlice(module, "weight"), None)]

        def forward(self, module: Gated, apply: Any, x: Tensor) -> Tensor:
            return torch.sigmoid(x) * apply("", x)

    module, x = Gated(), torch.randn(4, 3).double()
    assert isinstance(rule_for(module), GatedRule)
    assert same(plain(module)(x), module(x))


@pytest.mark.parametrize("wrong", [int, "Linear", nn.Linear(1, 1)], ids=["type", "str", "object"])
def test_register_refuses_what_is_no_module_type(wrong: object) -> None:
    with pytest.raises(TypeError):
        register(wrong)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_query_that_sees_no_key_gets_what_pytorch_gives_it(weighted: bool) -> None:
    """Zeros from its fused attention, with a finite derivative; NaN where it returns weights."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(2, 3, 4).double().requires_grad_()
    hidden = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    arguments: dict[str, Any] = {"attn_mask": hidden, "need_weights": weighted}
    with sdpa_kernel(SDPBackend.MATH):
        wanted = module(x, x, x, **arguments)[0]
    found = plain(module)(x, x, x, **arguments)[0]
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert bool(found[:, 1].isnan().all()) == weighted
    (gradient,) = torch.autograd.grad(found[:, 0].sum() if weighted else found.sum(), x)
    assert weighted or bool(gradient.isfinite().all())


def test_queries_that_see_no_key_cost_no_memory() -> None:
    """The weights of attention, which are the most there is, are in its graph once."""
    module, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 40, 4)

    def kept(hidden: Tensor) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = plain(module)(x, x, x, attn_mask=hidden, need_weights=False)[0]
        assert output.requires_grad
        return sum(found.values())

    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    weights = 4 * 2 * 2 * 40 * 40  # bytes, samples, heads
    assert kept(hidden | (torch.arange(40)[:, None] == 3)) < kept(hidden) + weights / 4
