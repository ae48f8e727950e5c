"""How far the output of a network can have moved: theorem ``thm-drift`` for whole networks.

Let R_l be the inputs of layer l *before* the move, with basis B_l at tau, and e_l a bound on how
far the outputs of layer l moved on the batch, ``‖z̃_l - z_l‖_F``. From

    z̃_l - z_l = (W_l + ΔW_l)(x̃_l - x_l) + ΔW_l R_l

follows ``e_l <= ‖W_l + ΔW_l‖ e_{l-1} + ‖ΔW_l R_l‖_F`` with e_0 = 0: what a layer makes of the
drift it receives, plus its own, on inputs that had not drifted. Layers that do not move enlarge
what they receive by their Lipschitz constant (`teleport.bounds.lipschitz`).

The layer's own drift is bounded from the basis. With the singular values σ of R_l and its right
vectors, of which B_l holds the first k, ``‖ΔW R‖_F² = ‖ΔW B diag(σ_1..k)‖_F² + ‖ΔW P R‖_F²``, and

    ‖ΔW P R‖_F <= min(‖ΔW P‖₂ √(Σ_{i>k} σ_i²), ‖ΔW P‖_F σ_{k+1}).

The first term is rounding for a teleport at this tau; it is there so that the bound holds for any
move. As ``Σ_{i>k} σ_i² <= (1 - τ) ‖R‖_F²``, the *a priori* form ``‖ΔW‖₂ √(1 - τ) ‖R‖_F`` needs no
more of the inputs than their norm.

This is for chains. Attention has no such constant: it is not Lipschitz on unbounded inputs (Kim,
Papamakarios and Mnih, 2021). A residual connection cannot be written as a chain.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teleport.bounds.lipschitz import LINEAR, jump, lipschitz
from teleport.errors import UnsupportedModelError
from teleport.layers.rule import rule_for
from teleport.report import text_table
from teleport.runtime.wrappers import opened
from teleport.subspace import Basis, RowSpace


@dataclass(frozen=True)
class LayerBound:
    """One module of a chain; all but ``lipschitz`` are Frobenius norms over the batch.

    Attributes:
        name: as in ``model.named_modules()``.
        kind: its type.
        lipschitz: by how much it can enlarge a drift, with its weights after the move.
        own: bound on the drift its own move causes on inputs as they were.
        own_a_priori: the same from τ and ``‖R‖_F`` alone.
        bound: bound on the drift of its outputs.
        a_priori: the same with ``own_a_priori`` all through.
        measured: the drift of its outputs.
    """

    name: str
    kind: str
    lipschitz: float
    own: float
    own_a_priori: float
    bound: float
    a_priori: float
    measured: float


@dataclass(frozen=True)
class NetworkBound:
    """What `network_bound` found; print it.

    Attributes:
        tau: share of input energy that the bases keep.
        layers: in order of execution.
    """

    tau: float
    layers: tuple[LayerBound, ...]

    @property
    def bound(self) -> float:
        """Bound on ``‖F_after(X) - F_before(X)‖_F``."""
        return self.layers[-1].bound

    @property
    def a_priori(self) -> float:
        """The same bound from τ and the norms of the layer inputs, without their spectra."""
        return self.layers[-1].a_priori

    @property
    def measured(self) -> float:
        """The drift of the output, measured."""
        return self.layers[-1].measured

    @property
    def ratio(self) -> float:
        """Bound over measured drift: 1 is tight; infinite if nothing drifted."""
        return self.bound / self.measured if self.measured else math.inf

    def cross_entropy(self, count: int) -> float:
        """Bound on the change of the mean cross-entropy of ``count`` predictions.

        Its gradient in the logits of one prediction is ``p - y``, two distributions, so ``‖p -
        y‖₂² <= ‖p‖₁² + ‖y‖₁² = 2``: the change is at most ``√2 Σ_i ‖Δ_i‖ / n <= √(2 / n) ‖Δ‖_F``.
        It holds for soft labels, not for class weights.
        """
        return math.sqrt(2.0 / count) * self.bound

    def mean_squared_error(self, loss: float, numel: int) -> float:
        """Bound on the change of ``mse_loss``, which was ``loss``, over ``numel`` output entries.

        The root of the loss is a norm of the residual over √numel, and moves by no more than the
        output does over √numel.
        """
        far = self.bound / math.sqrt(numel)
        return far * (2.0 * math.sqrt(loss) + far)

    def __str__(self) -> str:
        names = ("lipschitz", "own", "a priori", "bound", "a priori", "measured")
        rows: list[tuple[str, ...]] = [("layer", "kind", *names)]
        for m in self.layers:
            values = (m.lipschitz, m.own, m.own_a_priori, m.bound, m.a_priori, m.measured)
            rows.append((m.name or "(model)", m.kind, *(f"{value:.3g}" for value in values)))
        end = f"output moved by {self.measured:.3g}, at most {self.bound:.3g} (tau {self.tau:g})"
        return "\n".join([*text_table(rows), end])


def network_bound(
    before: nn.Module, after: nn.Module, inputs: Tensor, tau: float = 1.0
) -> NetworkBound:
    """Bound on the drift of a network's output on a batch, beside the drift itself.

    It holds for any change of the weights of linear layers and convolutions; what makes it small is
    that they moved in the null space of this batch at this ``tau``.

    Args:
        before: a chain: `nn.Sequential`, nested or not, of linear layers, convolutions,
            activations, pooling, BatchNorm in evaluation mode, dropout (taken as off), Flatten.
        after: the same chain with other weights.
        inputs: the batch. Both models are evaluated in float64, on copies.
        tau: of the bases, in (0, 1].

    Returns:
        One line per module; ``bound`` is the bound on the output.

    Raises:
        UnsupportedModelError: if no constant is known for a module, naming it.
        ValueError: if the two models differ in more than the weights of such layers, or ``tau`` is
            out of range.

    Example:
        >>> before = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> after = copy.deepcopy(before)
        >>> _ = nn.init.zeros_(after[2].weight)
        >>> drift = network_bound(before, after, torch.randn(4, 8))
        >>> drift.measured <= drift.bound * (1 + 1e-12)
        True
    """
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must be in (0, 1], got {tau}")
    with torch.no_grad():
        return NetworkBound(tau, tuple(_walk(_chain(before), _chain(after), inputs, tau)))


_Chain = list[tuple[str, nn.Module]]


def _chain(model: nn.Module) -> _Chain:
    """The modules of a model in order of execution, as float64 copies with dropout off."""
    known: dict[nn.Module, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if module not in known:
            known[module] = copy.deepcopy(module).double()
            if isinstance(module, nn.modules.dropout._DropoutNd):
                known[module].eval()
        return known[module].requires_grad_(True)  # so that every bias is part of its matrix

    chain = [(name, twin(module)) for name, module in opened(model)]
    if not chain:
        raise UnsupportedModelError("the model is an nn.Sequential without layers")
    return chain


def _walk(before: _Chain, after: _Chain, inputs: Tensor, tau: float) -> Iterator[LayerBound]:
    """The recursion of the module docstring, and both networks beside it."""
    _check_alike(before, after)
    x = y = inputs.double()
    bound = a_priori = 0.0
    for (name, old), (_, new) in zip(before, after, strict=True):
        constant = lipschitz(new, x, name)
        own, rough = (0.0, 0.0)
        if isinstance(new, LINEAR):
            own, rough = _own_drift(old, new, x, tau)
        drifted = constant * bound + own + jump(new, x, bound)
        a_priori = constant * a_priori + rough + jump(new, x, a_priori)
        bound = drifted
        x, y = old(x.clone()), new(y.clone())  # copies: an activation may work in place
        measured = float((y - x).norm())
        yield LayerBound(name, type(new).__name__, constant, own, rough, bound, a_priori, measured)


def _own_drift(old: nn.Module, new: nn.Module, x: Tensor, tau: float) -> tuple[float, float]:
    """Bounds on ``‖ΔW R‖_F`` from the basis, and from the norm of the rows."""
    (part,), (moved,) = (rule_for(m).parts(m) for m in (old, new))  # type: ignore[union-attr]
    space = RowSpace()
    space.add(part.rows(x))
    basis, move = space.basis(tau), moved.matrix() - part.matrix()
    kept, left_out, largest = _energies(basis)
    inside = float((move @ basis.vectors * kept).norm())
    free = basis.project(move)
    spectral, frobenius = torch.linalg.matrix_norm(free, 2), torch.linalg.matrix_norm(free)
    outside = torch.minimum(spectral * left_out, frobenius * largest).norm()
    rows = basis.singular_values.norm(dim=-1)
    share = torch.maximum(math.sqrt(1.0 - tau) * rows, left_out)
    rough = (torch.linalg.matrix_norm(move, 2) * share).norm()
    return math.hypot(inside, float(outside)), math.hypot(inside, float(rough))


def _energies(
    basis: Basis,
) -> tuple[Float[Tensor, "*groups 1 width"], Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Singular values of the kept directions; norm, and largest, of the others."""
    values = basis.singular_values
    others = torch.arange(values.shape[-1], device=values.device) >= basis.ranks[..., None]
    rest = values * others
    width = basis.vectors.shape[-1]
    return (values * ~others)[..., None, :width], rest.norm(dim=-1), rest.amax(dim=-1)


def _check_alike(before: _Chain, after: _Chain) -> None:
    """Both chains have the same modules with equal state, but for weights that may move."""
    ours, theirs = ([(name, repr(m)) for name, m in chain] for chain in (before, after))
    if ours != theirs:
        differing = [f"{a} against {b}" for a, b in zip(ours, theirs, strict=False) if a != b]
        lengths = f"{len(ours)} modules against {len(theirs)}"
        raise ValueError(
            f"the models are not of one architecture: {(differing or [lengths])[0]}; compare a "
            "model with a copy of it made by copy.deepcopy before it moved"
        )
    for (name, old), (_, new) in zip(before, after, strict=True):
        state = new.state_dict()
        same = all(torch.equal(value, state[key]) for key, value in old.state_dict().items())
        if isinstance(new, nn.modules.batchnorm._BatchNorm):
            same &= old.training == new.training
        if not isinstance(new, LINEAR) and not same:
            raise ValueError(
                f"the {type(new).__name__} {name!r} differs between the models; the bound is for "
                "moves of linear layers and convolutions alone"
            )
