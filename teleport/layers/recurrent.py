"""Recurrent layers, unrolled: their input and hidden products as parts, called at every step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from teleport.layers.part import DenseMap, LinearMap, ParameterSlice, optional_slice
from teleport.layers.rule import Apply, LayerRule, register

HiddenState = tuple[Tensor, ...]
CellStep = Callable[[Tensor, Tensor, HiddenState], HiddenState]


def _lstm(x: Tensor, h: Tensor, state: HiddenState) -> HiddenState:
    i, f, g, o = (x + h).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: HiddenState) -> HiddenState:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return ((1 - z) * n + z * state[0],)


def _elman(activation: Callable[[Tensor], Tensor]) -> CellStep:
    return lambda x, h, state: (activation(x + h),)


def _cell(module: Any) -> CellStep:
    """How products of input and state become the next state: (hidden, memory) or (hidden,)."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _lstm
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _gru
    return _elman(torch.tanh if module.nonlinearity == "tanh" else torch.relu)


def _linear(module: nn.Module, name: str, suffix: str) -> LinearMap:
    weight = ParameterSlice(module, f"weight_{name}{suffix}")
    return DenseMap(name + suffix, weight, optional_slice(module, f"bias_{name}{suffix}"))


@register(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
class RecurrentCellRule(LayerRule[Any]):
    """Parts ``ih`` (rows: inputs) and ``hh`` (rows: hidden states)."""

    kind = "RecurrentCell"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        return [_linear(module, name, "") for name in ("ih", "hh")]

    def forward(self, module: Any, apply: Apply, x: Tensor, state: Any = None) -> Any:
        memory = isinstance(module, nn.LSTMCell)
        if state is None:
            state = (x.new_zeros(*x.shape[:-1], module.hidden_size),) * (2 if memory else 1)
        state = state if memory else (state,) if isinstance(state, Tensor) else state
        new = _cell(module)(apply("ih", x), apply("hh", state[0]), state)
        return new if memory else new[0]


@register(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentRule(LayerRule[Any]):
    """Parts ``ih_l0``, ``hh_l0``, … and ``…_reverse``: the rows of all time steps together.

    Stacked, bidirectional, projected (LSTM with ``proj_size``: part ``hr_l0``), batch first or not.
    Dropout between layers is off. A packed sequence is left alone, and so freezes the layer.
    """

    kind = "Recurrent"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        names = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
        return [_linear(module, name, suffix) for suffix in _suffixes(module) for name in names]

    def forward(self, module: Any, apply: Apply, x: Any, state: Any = None) -> Any:
        if isinstance(x, PackedSequence):
            return type(module).forward(module, x, state)
        batched = x.dim() == 3
        sequence = x if batched else x[:, None]
        if batched and module.batch_first:
            sequence = sequence.transpose(0, 1)
        starts = _starts(module, sequence, state, batched)
        ways = 2 if module.bidirectional else 1
        ends = []
        suffixes = _suffixes(module)
        for layer in range(module.num_layers):
            outputs = []
            for way in range(ways):
                index = layer * ways + way
                steps, end = _unroll(module, apply, suffixes[index], sequence, starts[index], way)
                outputs.append(steps)
                ends.append(end)
            sequence = torch.cat(outputs, dim=-1)
        return _packed_up(module, sequence, ends, batched)


def _suffixes(module: Any) -> list[str]:
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]


def _starts(module: Any, sequence: Tensor, state: Any, batched: bool) -> list[HiddenState]:
    """Initial states, one per layer and direction, each ``[samples, width]``."""
    count = len(_suffixes(module))
    if state is None:
        samples = sequence.shape[1]
        hidden = sequence.new_zeros(samples, module.proj_size or module.hidden_size)
        memory = sequence.new_zeros(samples, module.hidden_size)
        return [(hidden, memory) if isinstance(module, nn.LSTM) else (hidden,)] * count
    states = state if isinstance(module, nn.LSTM) else (state,)
    states = [s if batched else s[:, None] for s in states]
    return [tuple(s[i] for s in states) for i in range(count)]


def _unroll(
    module: Any, apply: Apply, suffix: str, sequence: Tensor, state: HiddenState, reverse: int
) -> tuple[Tensor, HiddenState]:
    """One layer in one direction over ``[steps, samples, features]``."""
    cell, products = _cell(module), apply("ih" + suffix, sequence)
    order = range(len(sequence))
    outputs: list[Tensor] = []
    for step in reversed(order) if reverse else order:
        state = cell(products[step], apply("hh" + suffix, state[0]), state)
        if module.proj_size:
            state = (apply("hr" + suffix, state[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _packed_up(module: Any, sequence: Tensor, ends: list[HiddenState], batched: bool) -> Any:
    """Output and final states in the shapes the module returns."""
    finals = tuple(torch.stack(pieces) for pieces in zip(*ends, strict=True))
    if not batched:
        sequence, finals = sequence[:, 0], tuple(f[:, 0] for f in finals)
    elif module.batch_first:
        sequence = sequence.transpose(0, 1)
    return sequence, finals if isinstance(module, nn.LSTM) else finals[0]
