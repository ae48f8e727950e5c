"""What the property tests draw: networks with a batch and a loss, and matrices of known rank.

A drawn value is a small frozen dataclass of numbers and names. It prints as code, it shrinks, and
it replays: its tensors are made from it alone, with its own torch seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import reference


@dataclass(frozen=True)
class Bend:
    """An activation as a module, as the reference wants it, and its Lipschitz constant."""

    module: Callable[[], nn.Module]
    reference: reference.Activation
    lipschitz: float = 1.0


def _density(z: Tensor) -> Tensor:
    return torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


LEAKY_RELU = reference.Activation(
    lambda z: torch.where(z > 0, z, 0.01 * z),
    lambda z: torch.where(z > 0, torch.ones_like(z), 0.01),
    torch.zeros_like,
)
GELU = reference.Activation(
    functional.gelu,
    lambda z: torch.special.ndtr(z) + z * _density(z),
    lambda z: (2 - z**2) * _density(z),
)
BENDS = {
    "Identity": Bend(nn.Identity, reference.IDENTITY),
    "ReLU": Bend(nn.ReLU, reference.RELU),
    "LeakyReLU": Bend(nn.LeakyReLU, LEAKY_RELU),
    "Tanh": Bend(nn.Tanh, reference.TANH),
    "GELU": Bend(nn.GELU, GELU, lipschitz=1.13),  # its slope peaks at z = √2 with 1.129
}
SMOOTH = ("Identity", "Tanh", "GELU")
NEVER_DEAD = ("LeakyReLU", "Tanh", "GELU", "Identity")
"""Activations under which some gradient always gets through: growth is always possible."""

LOSSES = ("mse", "cross_entropy")


@dataclass(frozen=True)
class Problem:
    """A model, the batch it is teleported on, and the closure that joins them."""

    model: nn.Sequential
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor], Tensor]

    def closure(self) -> Tensor:
        return self.loss(self.model(self.x).flatten(0, -2))

    @property
    def linears(self) -> list[nn.Linear]:
        return [m for m in self.model if isinstance(m, nn.Linear)]

    @property
    def batch(self) -> list[Tensor]:
        """The batch as the reference wants it: a list of vectors."""
        return list(self.x.flatten(0, -2))


def opposed(left: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Problem:
    """Every input twice, with targets on both sides of the output.

    Their gradients cancel but for a share ``left``, as near the minimum of a loss that is not 0.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        model.append(nn.Linear(48, 3)).to(dtype)
        x, off = torch.randn(6, 8).to(dtype), torch.randn(6, 3).to(dtype)
        z = model(x)
    y = torch.cat([z + off, z - off * (1.0 - left)])
    return Problem(model, torch.cat([x, x]), y, lambda z: (z - y).square().sum() * scale)


@dataclass(frozen=True)
class Case:
    """A multi-layer perceptron with a batch and a loss, described.

    Attributes:
        widths: of the input, of every hidden layer, of the output.
        biases: whether each layer has one.
        samples, positions: the batch is ``[samples, d]``, or ``[samples, positions, d]``.
        rank: of the inputs, before some of them are repeated or made zero.
        repeated, zeros: how many of the last rows repeat the first, or are zero.
    """

    widths: tuple[int, ...]
    biases: tuple[bool, ...]
    activation: str = "Tanh"
    loss: str = "mse"
    samples: int = 2
    positions: int = 1
    rank: int = 1
    repeated: int = 0
    zeros: int = 0
    seed: int = 0
    dtype: torch.dtype = torch.float64

    @property
    def rows(self) -> int:
        return self.samples * self.positions

    @property
    def bend(self) -> Bend:
        return BENDS[self.activation]

    def build(self) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Problem(self._model(), self._inputs(), *self._target())

    def _model(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        sizes = zip(self.widths, self.widths[1:], self.biases, strict=False)
        for d_in, d_out, bias in sizes:
            layers += [nn.Linear(d_in, d_out, bias, dtype=self.dtype), self.bend.module()]
        return nn.Sequential(*layers[:-1])

    def _inputs(self) -> Tensor:
        d_in = self.widths[0]
        left = torch.randn(self.rows, self.rank, dtype=torch.float64)
        x = left @ torch.randn(self.rank, d_in, dtype=torch.float64)
        x[self.rows - self.repeated :] = x[0]
        x[self.rows - self.zeros :] = 0.0
        shape = (self.samples, d_in) if self.positions == 1 else (self.samples, self.positions, -1)
        return x.reshape(shape).to(self.dtype)

    def _target(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if self.loss == "mse":
            y = torch.randn(self.rows, self.widths[-1], dtype=torch.float64).to(self.dtype)
            return y, lambda out: functional.mse_loss(out, y)
        labels = torch.randint(self.widths[-1], (self.rows,))
        return labels, lambda out: functional.cross_entropy(out, labels)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    depths: tuple[int, int] = (2, 5),
    activations: Sequence[str] = tuple(BENDS),
    losses: Sequence[str] = LOSSES,
    biases: st.SearchStrategy[bool] = st.booleans(),  # noqa: B008 (a description, not a state)
    most_positions: int = 3,
    roomy: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Any network and batch; with ``roomy`` every hidden layer is wider than the batch is long.

    Cross-entropy gets at least two classes, because with one its gradient is zero. Zero rows never
    fill the batch.
    """
    depth = draw(st.integers(*depths), label="depth")
    samples = draw(st.integers(1, 4 if roomy else 10), label="samples")
    positions = draw(st.integers(1, most_positions), label="positions")
    rows = samples * positions
    hidden = st.integers(rows + 2, rows + 6) if roomy else st.integers(1, 8)
    loss = draw(st.sampled_from(losses), label="loss")
    inner = draw(st.lists(hidden, min_size=depth - 1, max_size=depth - 1), label="hidden")
    d_in = draw(st.integers(1, 6), label="d_in")
    d_out = draw(st.integers(2 if loss == "cross_entropy" else 1, 4), label="d_out")
    few = st.integers(0, min(2, rows - 1))
    return Case(
        widths=(d_in, *inner, d_out),
        biases=tuple(draw(st.lists(biases, min_size=depth, max_size=depth), label="biases")),
        activation=draw(st.sampled_from(activations), label="activation"),
        loss=loss,
        samples=samples,
        positions=positions,
        rank=draw(st.integers(1, min(rows, d_in)), label="rank"),
        repeated=draw(few, label="repeated"),
        zeros=draw(few, label="zeros"),
        seed=draw(seeds, label="seed"),
        dtype=dtype,
    )


seeds = st.integers(0, 2**16)
with_bias = st.just(True)


def network(model: nn.Sequential) -> reference.Network:
    """The reference's matrices of a perceptron whose layers all have a bias."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    return [torch.cat([m.weight, m.bias[:, None]], dim=1).detach().clone() for m in linears]


def matrix_gradients(problem: Problem) -> list[Tensor]:
    """The loss's gradient by plain autograd, one matrix per layer, bias column last."""
    return join_like(problem, gradient(problem.model, problem.closure))


def join_like(problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the order of ``model.parameters()`` as one matrix per layer."""
    rest = list(tensors)
    return [
        torch.cat([rest.pop(0).reshape(m.out_features, -1) for _ in m.parameters()], dim=1)
        for m in problem.linears
    ]


def gradient(model: nn.Module, closure: Callable[[], Tensor]) -> list[Tensor]:
    """Plain autograd, sharing nothing with the package."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(closure(), parameters, materialize_grads=True))


def gradient_norm(model: nn.Module, closure: Callable[[], Tensor]) -> float:
    squares = [float(g.double().square().sum()) for g in gradient(model, closure)]
    return math.sqrt(sum(squares))


@torch.no_grad()
def add_matrices(problem: Problem, moves: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add one matrix per layer, bias column last where the layer has a bias, to the weights."""
    for linear, move in zip(problem.linears, moves, strict=True):
        linear.weight += scale * move[:, : linear.in_features]
        if linear.bias is not None:
            linear.bias += scale * move[:, linear.in_features]


def layer_rows(problem: Problem) -> list[Tensor]:
    """Input rows of every layer, with a 1 for the bias, by running the layers one by one."""
    x, found = problem.x, []
    for module in problem.model:
        if isinstance(module, nn.Linear):
            flat = x.detach().reshape(-1, module.in_features)
            one = flat.new_ones(len(flat), 0 if module.bias is None else 1)
            found.append(torch.cat([flat, one], dim=1))
        x = module(x)
    return found


def rank_is_clear(problem: Problem) -> bool:
    """All singular values are rounding, or above 1e-5 of the largest.

    Then two correct programs find the same rank, and bases that agree to eps / 1e-5.
    """
    for rows in layer_rows(problem):
        values = torch.linalg.svdvals(rows)
        rounding = max(rows.shape) * torch.finfo(rows.dtype).eps / 10
        if bool(((values > rounding * values[0]) & (values < 1e-5 * values[0])).any()):
            return False
    return True


@dataclass(frozen=True)
class Rows:
    """An integer matrix of exactly this rank: ``[I; A] [I, B]`` with rows and columns mixed."""

    count: int
    width: int
    rank: int
    seed: int = 0
    dtype: torch.dtype = torch.float64

    def build(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        eye = torch.eye(self.rank, dtype=torch.float64)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-2, 3, shape, generator=generator).double()

        left = torch.cat([eye, integers(self.count - self.rank, self.rank)])
        right = torch.cat([eye, integers(self.rank, self.width - self.rank)], dim=1)
        mixed = (left @ right)[torch.randperm(self.count, generator=generator)]
        return mixed[:, torch.randperm(self.width, generator=generator)].to(self.dtype)


@st.composite
def rows_of_rank(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32)
) -> Rows:
    """Rows fewer and more than columns, of any rank, 0 included."""
    count, width = draw(st.integers(1, 14), label="count"), draw(st.integers(1, 9), label="width")
    rank = draw(st.integers(0, min(count, width)), label="rank")
    return Rows(count, width, rank, draw(seeds, label="seed"), draw(st.sampled_from(dtypes)))
