"""Ways to learn the next task without losing the old ones.

Each is a class with the same few hooks in a training step, and one line in `LEARNING_METHODS`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from teleport.keeping.keeper import Attachment, Keeper
from teleport.keeping.null_space import NullSpace, null_space
from teleport.subspace import Basis


class Plain:
    """SGD, and nothing else; the base of the other methods.

    Args:
        tau: share of input energy kept, where the method uses a null space.
        draws: source of the method's own random choices.
    """

    uses_tau = False
    sees_all = False
    """Whether `learned` is given all images of the task, of which none is kept."""

    optimizer: type[Optimizer] = SGD

    def __init__(self, tau: float, draws: torch.Generator) -> None:
        self.tau, self.draws = tau, draws

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Called after every task with the images of it that may be kept, and their labels."""

    def begins(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called before the first step on a task."""

    def prepared(self, inputs: Tensor) -> Tensor:
        """All images ``[n, width]`` of a new task as ``[n, ...]``, batches of which are given."""
        return inputs

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What to train on instead of a batch of the new task."""
        return inputs, targets

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's outputs on such a batch, for the loss."""
        out: Tensor = model(inputs)
        return out

    def before_step(self, model: nn.Module) -> None:
        """Called when the gradients are there."""

    def after_step(self, model: nn.Module) -> None:
        """Called when the optimizer has moved the parameters."""

    def ended(self) -> None:
        """Called when the last step on a task is done."""

    def stored(self) -> tuple[int, int]:
        """Bytes and labels kept of old tasks."""
        return 0, 0


class Replay(Plain):
    """Some of the kept old images, with their labels, join every batch."""

    PER_BATCH = 16

    def __init__(self, tau: float, draws: torch.Generator) -> None:
        super().__init__(tau, draws)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Keep images and labels."""
        joined = zip(*self._kept, (inputs, targets), strict=True)
        self._kept = [tuple(torch.cat(parts) for parts in joined)]  # type: ignore[list-item]

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch with old images, drawn from all old tasks alike, behind it."""
        old, labels = self._kept[0]
        rows = torch.randint(len(old), (self.PER_BATCH,), generator=self.draws)
        return torch.cat([inputs, old[rows]]), torch.cat([targets, labels[rows]])

    def stored(self) -> tuple[int, int]:
        """Of the images and labels themselves."""
        return sum(x.nbytes + y.nbytes for x, y in self._kept), sum(len(y) for _, y in self._kept)


class _Spaces(Plain):
    """The null space of the kept old images; spaces of several tasks are joined whole."""

    uses_tau = True
    space: NullSpace | None = None

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Add the null space of these images; labels are not used, images not kept."""
        new = self._space(model, inputs)
        self.space = new if self.space is None else self.space.merge(new)

    def stored(self) -> tuple[int, int]:
        """Of the bases, and of the singular values that go with them."""
        bases = {} if self.space is None else self.space.bases
        kept = [b for b in bases.values() if isinstance(b, Basis)]
        return sum(b.vectors.nbytes + b.singular_values.nbytes for b in kept), 0

    def _space(self, model: nn.Module, inputs: Tensor) -> NullSpace:
        return null_space(model, [lambda: model(inputs)], self.tau)


class Projected(_Spaces):
    """Every gradient is projected into the null space of the kept old images.

    This is Gradient Projection Memory (Saha et al. 2021), with biases and with one tau for all
    layers; spaces of several tasks are joined whole.
    """

    def before_step(self, model: nn.Module) -> None:
        """Project the gradients."""
        if self.space is not None:
            self.space.project_(model)


class Lazy(_Spaces):
    """The displacement is projected, once every ten steps and at the end of the task."""

    EVERY = 10
    _keeper: Keeper | None = None

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Add the null space, and count displacements from here."""
        super().learned(model, inputs, targets)
        assert self.space is not None
        self._keeper = self.space.keep(model, every=self.EVERY)

    def after_step(self, model: nn.Module) -> None:
        """Project if it is time."""
        if self._keeper is not None:
            with self._keeper:
                pass

    def ended(self) -> None:
        """Project what has come since."""
        if self._keeper is not None:
            self._keeper.project()


class Random(Projected):
    """The control: gradients projected as in `Projected`, with random subspaces of its ranks."""

    def _space(self, model: nn.Module, inputs: Tensor) -> NullSpace:
        found = super()._space(model, inputs)
        bases = {n: b for n, b in found.bases.items() if isinstance(b, Basis)}  # no embeddings here
        return NullSpace({n: random_basis(b, self.draws) for n, b in bases.items()})


class _Grown(_Spaces):
    """Spaces as of Gradient Projection Memory: each task adds only the energy that is missing."""

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Keep each layer's share of the energy of these images, what is kept of it counted."""
        everything = null_space(model, [lambda: model(inputs)])
        taus = self._taus(list(everything.bases))
        if self.space is None:
            self.space = everything.grow(taus)
        else:
            self.space = self.space.merge(everything, taus)
        self._tasks += 1

    _tasks = 0

    def _taus(self, layers: list[str]) -> dict[str, float]:
        """GPM's: tau for the first layer, a fifth of its distance to 1 for the others."""
        return {
            name: self.tau if i == 0 else 1 - (1 - self.tau) / 5 for i, name in enumerate(layers)
        }


class Gpm(_Grown):
    """Gradient Projection Memory (Saha et al. 2021), its gradients made in the null space.

    The gradient of a linear layer is a sum of products of a delta and an input. Projecting it is
    to project the inputs, of which a batch has fewer than the layer has outputs; those of the
    first layer do not change, and are projected once a task. The model is a sequence of linear
    layers without biases and of functions without parameters.
    """

    _free: list[Float[Tensor, "d d"]] | None = None

    def begins(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Make the projections, in the precision of the weights."""
        if self.space is not None:
            own = next(model.parameters()).dtype
            bases = [b for b in self.space.bases.values() if isinstance(b, Basis)]
            every = [torch.eye(basis.shape[-1], dtype=torch.float64) for basis in bases]
            self._free = [b.project(e).to(own) for b, e in zip(bases, every, strict=True)]

    def prepared(self, inputs: Tensor) -> Tensor:
        """``[n, 2, width]``: the images, and their parts in the null space."""
        return inputs if self._free is None else torch.stack([inputs, inputs @ self._free[0]], 1)

    def outputs(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The model's own, whose gradients are of the projected inputs."""
        if self._free is None:
            return super().outputs(model, inputs)
        first, *others = model.children()
        x = _linear(inputs[:, 0], inputs[:, 1], first.weight)
        projections = iter(self._free[1:])
        for layer in others:
            is_linear = isinstance(layer, nn.Linear)
            x = _linear(x, x.detach() @ next(projections), layer.weight) if is_linear else layer(x)
        return x


class GpmLazy(_Grown):
    """The same spaces, attached to the optimizer: displacements projected every 50 steps."""

    EVERY = 50
    _attached: Attachment | None = None

    def begins(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Attach the space."""
        if self.space is not None:
            self._attached = self.space.attach(optimizer, self.EVERY, model=model)

    def ended(self) -> None:
        """Project what has come since, and let the optimizer go."""
        if self._attached is not None:
            self._attached.remove()
            self._attached = None


class GpmGrowing(Gpm):
    """As `Gpm`, with thresholds that go from its own up to 1 in tenths, one a task."""

    def _taus(self, layers: list[str]) -> dict[str, float]:
        left = max(0.0, 1 - self._tasks / 10)
        return {name: 1 - (1 - tau) * left for name, tau in super()._taus(layers).items()}


class GpmAdam(GpmLazy):
    """As `GpmLazy`, with Adam."""

    optimizer = Adam


class TwoSided(Plain):
    """The displacement is shrunk where the old losses see it, once every two hundred steps.

    A null space asks which inputs a layer has had. Here it is asked, too, which of its outputs
    mattered: to second order the loss of old tasks rises by ``tr(G D A Dᵀ) / 2`` with the
    displacement ``D`` of a layer, its inputs' second moment ``A`` and that of the loss's gradients
    at its outputs, ``G`` (K-FAC; labels are drawn from the model, none is needed). `STRENGTH` times
    that is added to the new loss by proximal steps in the eigenvectors of both. Factors of several
    tasks are summed, their product divided by the number of tasks. The penalty is that of Ritter et
    al. 2018 (arXiv 1805.07810). The model is as for `Gpm`.
    """

    STRENGTH = 10.0
    EVERY = 200
    sees_all = True
    _sums: Sequence[tuple[Tensor, Tensor]] = ()
    _layers: Sequence[tuple[Tensor, ...]] = ()
    _rate = 0.0
    _tasks = 0
    _since = 0

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Add the factors of these images; labels are not used, images not kept."""
        new = two_sides(model, inputs, self.draws)
        old = self._sums or [(torch.zeros_like(a), torch.zeros_like(g)) for a, g in new]
        self._sums = [(a + b, g + h) for (a, g), (b, h) in zip(old, new, strict=True)]
        self._tasks += 1

    def begins(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Decompose the factors, and count displacements from here."""
        self._rate = optimizer.param_groups[0]["lr"]
        self._layers = []
        for weight, sides in zip(model.parameters(), self._sums, strict=False):
            (seen, ins), (felt, outs) = (torch.linalg.eigh(side) for side in sides)
            curvature = felt.clamp(min=0)[:, None] * seen.clamp(min=0) / self._tasks
            self._layers.append((weight, weight.detach().clone(), ins, outs, curvature))

    def after_step(self, model: nn.Module) -> None:
        """Shrink if it is time."""
        self._since += 1
        if self._since == self.EVERY:
            self.ended()

    @torch.no_grad()
    def ended(self) -> None:
        """The proximal step of the penalty, for the steps since the last one."""
        strength = self.STRENGTH * self._rate * self._since
        for weight, origin, ins, outs, curvature in self._layers:
            moved = outs.mT @ (weight - origin) @ ins
            weight.copy_(origin + outs @ (moved / (1 + strength * curvature)) @ ins.mT)
        self._since = 0

    def stored(self) -> tuple[int, int]:
        """Of the factors."""
        return sum(a.nbytes + g.nbytes for a, g in self._sums), 0


LEARNING_METHODS: dict[str, type[Plain]] = {
    "plain": Plain,
    "projected": Projected,
    "lazy": Lazy,
    "replay": Replay,
    "random": Random,
    "gpm": Gpm,
    "gpm-lazy": GpmLazy,
    "gpm-growing": GpmGrowing,
    "gpm-adam": GpmAdam,
    "two-sided": TwoSided,
}


def two_sides(
    model: nn.Module, inputs: Tensor, draws: torch.Generator
) -> list[tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_out d_out"]]]:
    """Second moments of each linear layer's inputs, and of the loss's gradients at its outputs."""
    x, seen = inputs, []
    for layer in model.children():
        out = layer(x)
        if isinstance(layer, nn.Linear):
            seen.append((x.detach(), out))
        x = out
    labels = torch.multinomial(x.detach().softmax(1), 1, generator=draws)[:, 0]
    loss = cross_entropy(x, labels, reduction="sum")
    deltas = torch.autograd.grad(loss, [out for _, out in seen])
    count = len(inputs)
    return [(z.mT @ z / count, d.mT @ d / count) for (z, _), d in zip(seen, deltas, strict=True)]


class _Linear(torch.autograd.Function):
    """``x Wᵀ``, with the gradient for W that other inputs would have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(others, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (delta,) = deltas
        others, weight = ctx.saved_tensors
        return delta @ weight if ctx.needs_input_grad[0] else None, None, delta.mT @ others


def _linear(x: Tensor, others: Tensor, weight: Any) -> Tensor:
    out: Tensor = _Linear.apply(x, others, weight)
    return out


def random_basis(basis: Basis, draws: torch.Generator) -> Basis:
    """A basis of a random subspace with the same ranks, uniformly distributed.

    Its singular values are those of ``basis``; they say nothing about the random vectors.
    """
    shape = basis.vectors.shape
    noise = torch.randn(shape, dtype=basis.vectors.dtype, generator=draws)
    kept = torch.arange(shape[-1]) < basis.ranks[..., None]
    orthonormal = torch.linalg.qr(noise).Q * kept[..., None, :]
    return Basis(orthonormal, basis.singular_values, basis.ranks, basis.dtype)
