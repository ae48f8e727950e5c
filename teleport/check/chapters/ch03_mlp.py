"""Chapter 3: span, invariance, projection, what survives it, and one teleport by hand."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teleport import reference
from teleport.check.answers import alike, vanishes
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property
from teleport.check.literal import literal

Weights = list[Tensor]


@dataclass(frozen=True)
class SquaredError:
    """Half the squared error of a linear network without biases on the columns of ``x``."""

    x: Tensor
    y: Tensor

    def __call__(self, weights: Weights) -> Tensor:
        """The loss, differentiable twice."""
        z = self.x
        for weight in weights:
            z = weight @ z
        return (z - self.y).square().sum() / 2

    def statements(self, name: str) -> list[str]:
        """Code that makes this loss."""
        return [
            f"x = {literal(self.x)}",
            f"y = {literal(self.y)}",
            f"def {name}(weights):",
            "    z = x",
            "    for weight in weights:",
            "        z = weight @ z",
            "    return (z - y).square().sum() / 2",
        ]


def weights_gradient(weights: Weights, loss: Callable[[Weights], Tensor]) -> Weights:
    """∇L."""
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    return list(torch.autograd.grad(loss(leaves), leaves))


def ascent(
    weights: Weights,
    loss: Callable[[Weights], Tensor],
    of: Callable[[Tensor], Tensor] = lambda square: square / 2,
) -> Weights:
    """∇T, or the gradient of another function of ‖g‖²."""
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    g = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    square = torch.stack([part.square().sum() for part in g]).sum()
    return list(torch.autograd.grad(of(square), leaves, materialize_grads=True))


def rows_with_one(inputs: Tensor) -> Tensor:
    """Inputs ``[*, d]`` as rows ``[n, d + 1]``, with a 1 for the bias."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)


rows = Check(
    name="rows",
    takes={"inputs": "[*, d]"},
    gives="[n, d + 1]",
    cases=lambda draw: {
        "inputs": draw.matrix(*draw.choice((2,), (1,), (2, 2), ()), draw.choice(2, 1, 3))
    },
    answer=rows_with_one,
    properties={
        "One row for each position of a layer's input, with a 1 appended for the bias.": Property(
            "thm-span"
        )
    },
    mistakes=lambda x: {
        "The bias column is forgotten: append a 1 to every row.": lambda: x.reshape(
            -1, x.shape[-1]
        ),
        "The bias is the *last* column of the weights, so the 1 comes last.": lambda: rows_with_one(
            x
        ).roll(1, dims=1),
        "These are the inputs as columns, R; "
        "here they are wanted as rows, its transposed.": lambda: rows_with_one(x).T,
        "The leading axes (samples, tokens) all become one: reshape(-1, d) first.": lambda: (
            torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        ),
        "The bias column is 1, not 0: a bias is a weight on an input that is 1.": lambda: (
            rows_with_one(x) * torch.tensor([1.0] * x.shape[-1] + [0.0]).double()
        ),
    },
)
"""A layer's inputs as rows, bias included."""


weight_gradient = Check(
    name="weight_gradient",
    takes={"delta": "[n, d_out]", "rows": "[n, d_in]"},
    gives="[d_out, d_in]",
    cases=lambda draw: {
        "delta": draw.matrix(count := draw.choice(2, 1, 3), draw.choice(1, 2, 3)),
        "rows": draw.matrix(count, draw.choice(2, 1, 3)),
    },
    answer=lambda delta, rows: delta.T @ rows,
    properties={
        "The gradient by the weights is the sum over the samples of δ xᵀ.": Property("thm-span")
    },
    mistakes=lambda d, r: {
        "The sides are transposed: rows of the gradient are combinations of *inputs*.": lambda: (
            r.T @ d
        ),
        "That is the mean over the samples. A 1/n is in δ already, if the loss has one.": lambda: (
            d.T @ r / len(r)
        ),
        "Only the first sample counts here: sum over all.": lambda: torch.outer(d[0], r[0]),
        "Only the last sample counts here: add to the sum, do not overwrite it.": lambda: (
            torch.outer(d[-1], r[-1])
        ),
        "You multiplied the sums. What is wanted is the sum of the products.": lambda: torch.outer(
            d.sum(0), r.sum(0)
        ),
    },
)
"""The gradient of the loss by a weight matrix."""


def _projection_case(draw: Draw) -> Case:
    size = draw.choice(2, 3, 4)
    count = draw.choice(*[k for k in (1, 2, 3, 0, 4) if k <= size])
    return {
        "gradient": draw.matrix(draw.choice(1, 2, 3), size),
        "basis": draw.orthonormal(size, count),
    }


def _only_kept(case: Case, got: Tensor) -> bool:
    removed = case["gradient"] - got
    return alike(removed @ case["basis"] @ case["basis"].T, removed)


projection = Check(
    name="projection",
    takes={"gradient": "[d_out, d_in]", "basis": "[d_in, k]"},
    gives="[d_out, d_in]",
    cases=_projection_case,
    answer=reference.equation_11,
    properties={
        "What is left must not act on the kept inputs, π(G) B = 0: then the loss stays.": Property(
            "thm-invariance", lambda case, got: vanishes(got @ case["basis"])
        ),
        "Nothing but the part in the span is removed: G - π(G) lies in the span of B.": Property(
            "thm-layerwise", _only_kept
        ),
    },
    mistakes=lambda g, b: {
        "You projected *onto* the span of the inputs. What keeps the loss is what is left "
        "when that part is taken away: G - G B Bᵀ.": lambda: g @ b @ b.T,
        "The sides are transposed: the basis belongs to the inputs, the *second* axis of the "
        "gradient, so it multiplies from the right.": lambda: g - b @ (b.T @ g),
        "Nothing is projected: this is the gradient itself.": lambda: g,
        "The last column of the basis is missing: k is one short.": lambda: reference.equation_11(
            g, b[:, :-1]
        ),
        "Only the first column of the basis is used.": lambda: reference.equation_11(g, b[:, :1]),
        "The part in the span is added instead of taken away.": lambda: g + g @ b @ b.T,
        "The part in the span is taken away twice: that is a reflection.": lambda: (
            g - 2 * g @ b @ b.T
        ),
        "B Bᵀ, not Bᵀ B: the product must be [d_in, d_in].": lambda: g - g @ (b.T @ b),
    },
)
"""A gradient projected out of the span of a layer's inputs."""


def _survivor(delta: Tensor, tangents: Tensor, basis: Tensor) -> Tensor:
    return delta.T @ (tangents - tangents @ basis @ basis.T)


def _survivor_case(draw: Draw) -> Case:
    count, size = draw.choice(2, 1, 3), draw.choice(2, 3)
    return {
        "delta": draw.matrix(count, draw.choice(1, 2, 3)),
        "tangents": draw.matrix(count, size),
        "basis": draw.orthonormal(size, draw.choice(1, 0, 2)),
    }


survivor = Check(
    name="survivor",
    takes={"delta": "[n, d_out]", "tangents": "[n, d_in]", "basis": "[d_in, k]"},
    gives="[d_out, d_in]",
    cases=_survivor_case,
    answer=_survivor,
    properties={
        "The direction must not act on the kept inputs: π(Hg) B = 0.": Property(
            "thm-invariance", lambda case, got: vanishes(got @ case["basis"])
        ),
        "π(Hg) is the sum over the samples of δ (P ẋ)ᵀ.": Property("thm-survivor"),
    },
    mistakes=lambda d, t, b: {
        "The tangents are not projected: this part of Hg still acts on the inputs.": lambda: (
            d.T @ t
        ),
        "You kept the part of the tangents *inside* the span; the part outside survives.": lambda: (
            d.T @ (t @ b @ b.T)
        ),
        "The sides are transposed: δ belongs to the outputs, the first axis.": lambda: (
            _survivor(d, t, b).T
        ),
        "That is the mean over the samples. A 1/n is in δ already, if the loss has one.": lambda: (
            _survivor(d, t, b) / len(d)
        ),
        "You multiplied the sums. What is wanted is the sum of the products.": lambda: _survivor(
            d.sum(0)[None], t.sum(0)[None], b
        ),
    },
)
"""The projected direction of one layer from δ and the tangents of its inputs."""


def _network(draw: Draw, turned: bool = True) -> Case:
    """Two linear layers whose inputs on the batch have known orthonormal bases, axes or not."""
    size, width, out = draw.choice(2, 3), draw.choice(2, 3), draw.choice(1, 2)
    axis, samples = draw.integer(0, size - 1), draw.choice(1, 2)
    x = torch.zeros(size, samples, dtype=torch.float64)
    x[axis] = draw.positive(samples, high=2)
    hidden = draw.orthonormal(width, 1, turned)
    first = draw.matrix(width, size, low=-2, high=2)
    first[:, axis] = (5 * hidden if 0.6 in hidden.abs() else hidden)[:, 0]
    first[:, axis] *= draw.choice(1.0, -1.0)
    second = draw.matrix(out, width, low=-2, high=2)
    input_basis = torch.eye(size, dtype=torch.float64)[:, axis : axis + 1].clone()
    loss = SquaredError(x, draw.matrix(out, samples))
    return {"weights": [first, second], "loss": loss, "bases": [input_basis, hidden]}


teleport_gradient = Check(
    name="teleport_gradient",
    takes={"weights": "list of [d_out, d_in]", "loss": "of the weights"},
    gives="list of [d_out, d_in]",
    cases=lambda draw: {k: v for k, v in _network(draw).items() if k != "bases"},
    answer=ascent,
    properties={
        "The gradient of the teleport objective T = ½ ‖g‖² is Hg, "
        "all layers' g together.": Property("thm-survivor")
    },
    mistakes=lambda w, loss: {
        "That is the gradient of the loss, g. Differentiate ½ ‖g‖² once more.": lambda: (
            weights_gradient(w, loss)
        ),
        "The factor ½ is missing in T: this is the gradient of ‖g‖².": lambda: ascent(
            w, loss, lambda square: square
        ),
        "That is the gradient of ‖g‖; T is half of its square.": lambda: ascent(
            w, loss, torch.sqrt
        ),
        "Every layer's own ‖g_l‖² alone was differentiated by its own weights; T is the sum over "
        "all layers, and each weight moves all of it.": lambda: _layer_by_layer(w, loss),
        "All zero: was the graph of the gradient kept? Pass create_graph=True.": lambda: [
            torch.zeros_like(part) for part in w
        ],
    },
)
"""∇T by double backward."""


def _layer_by_layer(weights: Weights, loss: Callable[[Weights], Tensor]) -> Weights:
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    g = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    return [
        torch.autograd.grad(part.square().sum() / 2, leaf, retain_graph=True)[0]
        for part, leaf in zip(g, leaves, strict=True)
    ]


def _project(parts: Weights, bases: Weights) -> Weights:
    return [reference.equation_11(part, basis) for part, basis in zip(parts, bases, strict=True)]


def _step(weights: Weights, loss: Any, bases: Weights, eta: float) -> Weights:
    return reference.equation_5(weights, _project(ascent(weights, loss), bases), eta)


def _same_loss(case: Case, got: Any) -> bool:
    return alike(case["loss"](got), case["loss"](case["weights"]))


teleport_step = Check(
    name="teleport_step",
    takes={
        "weights": "list of [d_out, d_in]",
        "loss": "of the weights",
        "bases": "list of [d_in, k]",
        "eta": "> 0",
    },
    gives="list of [d_out, d_in]",
    cases=lambda draw: {**_network(draw), "eta": draw.choice(1.0, 0.5, 0.25)},
    answer=_step,
    properties={
        "The loss on the batch is the same after the step.": Property("thm-invariance", _same_loss),
        "All layers move together, each by η times its projected part of ∇T.": Property(
            "thm-layerwise"
        ),
    },
    mistakes=lambda w, loss, b, eta: {
        "The sign is that of descent. A teleport *climbs* T: add η π(∇T).": lambda: _step(
            w, loss, b, -eta
        ),
        "The direction is not projected, so the loss moves.": lambda: reference.equation_5(
            w, ascent(w, loss), eta
        ),
        "You projected *onto* the span of the inputs instead of out of it.": lambda: (
            reference.equation_5(
                w, [g @ basis @ basis.T for g, basis in zip(ascent(w, loss), b, strict=True)], eta
            )
        ),
        "You moved along the projected gradient of the loss. It lies in the span of the inputs, "
        "so nothing moves (thm-span). What survives is part of ∇T.": lambda: reference.equation_5(
            w, _project(weights_gradient(w, loss), b), eta
        ),
        "You moved along the gradient of the loss. Move along the projected ∇T.": lambda: (
            reference.equation_5(w, weights_gradient(w, loss), eta)
        ),
        "The direction has the factor 2: T is *half* of ‖g‖².": lambda: _step(w, loss, b, 2 * eta),
        "You return the step, not the new weights.": lambda: [
            eta * p for p in _project(ascent(w, loss), b)
        ],
        "The step size is not used.": lambda: _step(w, loss, b, 1.0),
        "The bases are in the wrong order: each layer has its own.": lambda: _step(
            w, loss, b[::-1], eta
        ),
    },
)
"""One step of a teleport."""


def _walk(
    weights: Weights,
    loss: Any,
    bases: Weights,
    eta: float,
    steps: int,
    cap: float,
    goes: Callable[[float, float], bool] = operator.le,
) -> Weights:
    for _ in range(steps):
        if not goes(_norm(weights, loss), cap):
            break
        weights = _step(weights, loss, bases, eta)
    return weights


def _norm(weights: Weights, loss: Any) -> float:
    return float(torch.cat([g.flatten() for g in weights_gradient(weights, loss)]).norm())


def _cap_case(draw: Draw) -> Case:
    network = _network(draw, turned=False)
    eta, steps = draw.choice(0.125, 0.0625), draw.choice(2, 1, 3)
    # A limit near the norm at some point of the walk, so that it matters where one looks at it.
    behind = _walk(**network, eta=eta, steps=draw.integer(0, steps), cap=math.inf)
    limit = math.floor(_norm(behind, network["loss"])) + 0.5
    return {**network, "eta": eta, "steps": steps, "limit": limit}


def _steps_back(
    weights: Weights, loss: Any, bases: Weights, eta: float, steps: int, cap: float
) -> Weights:
    for _ in range(steps):
        new = _step(weights, loss, bases, eta)
        if _norm(new, loss) > cap:
            break
        weights = new
    return weights


cap = Check(
    name="cap",
    takes={**teleport_step.takes, "steps": "whole number", "limit": "> 0"},
    gives="list of [d_out, d_in]",
    cases=_cap_case,
    answer=_walk,
    properties={
        "The loss on the batch is the same after the walk.": Property("thm-invariance", _same_loss),
        "At most `steps` steps, "
        "and none from a point whose gradient norm is above the limit.": Property("thm-invariance"),
    },
    mistakes=lambda w, loss, b, eta, steps, cap: {
        "The cap is not used: stop as soon as the gradient norm is above it.": lambda: _walk(
            w, loss, b, eta, steps, math.inf
        ),
        "The cap is on the norm ‖g‖, and you compare it with its square or half of that.": (
            lambda: _walk(w, loss, b, eta, steps, cap**0.5),
            lambda: _walk(w, loss, b, eta, steps, (2 * cap) ** 0.5),
        ),
        "You look at the norm after the step only: a start above the cap must not move.": lambda: (
            _walk(_step(w, loss, b, eta), loss, b, eta, steps - 1, cap)
        ),
        "You drop the step that passes the cap; the walk ends *behind* it, "
        "as in the paper.": lambda: _steps_back(w, loss, b, eta, steps, cap),
        "You walk while the norm is *above* the cap.": lambda: _walk(
            w, loss, b, eta, steps, cap, operator.gt
        ),
        "There is one step too few.": lambda: _walk(w, loss, b, eta, steps - 1, cap),
    },
)
"""A walk of several steps with a cap on the gradient norm."""


def _tied_case(draw: Draw) -> Case:
    hidden, inputs = draw.choice(2, 1, 3), draw.choice(2, 1, 3)
    return {
        "gradient": draw.matrix(hidden, inputs),
        "basis": draw.orthonormal(inputs, draw.integer(0, inputs)),
        "hidden_basis": draw.orthonormal(hidden, draw.integer(0, hidden)),
    }


tied_projection = Check(
    name="tied_projection",
    takes={"gradient": "[h, d]", "basis": "[d, k]", "hidden_basis": "[h, m]"},
    gives="[h, d]",
    cases=_tied_case,
    answer=lambda gradient, basis, hidden: reference.equation_12(
        reference.equation_11(gradient, basis), hidden
    ),
    properties={
        "The use as W x: the change must not act on the span of the inputs.": Property(
            "thm-invariance", lambda case, got: vanishes(got @ case["basis"])
        ),
        "The use as Wᵀ s: the transposed change must not act on the span of the s.": Property(
            "thm-invariance", lambda case, got: vanishes(got.T @ case["hidden_basis"])
        ),
        "Nothing but what acts on one of the two spans is removed.": Property("thm-layerwise"),
    },
    mistakes=lambda g, b, h: {
        "Only the use as W x is respected: the same weights act as Wᵀ s, too.": lambda: (
            reference.equation_11(g, b)
        ),
        "Only the use as Wᵀ s is respected: the same weights act as W x, too.": lambda: (
            reference.equation_12(g, h)
        ),
        "The two projections follow one another; subtracting both from the gradient "
        "takes what lies in both spans away twice.": lambda: g - g @ b @ b.T - h @ h.T @ g,
        "Too much is removed or too little: project each side, then the other. "
        "You remove only what lies in both spans.": lambda: g - h @ h.T @ g @ b @ b.T,
        "You projected *onto* the spans instead of out of them.": lambda: h @ h.T @ g @ b @ b.T,
        "Nothing is projected: this is the gradient itself.": lambda: g,
    },
)
"""The projection of a weight that is used as itself and as its transpose."""
