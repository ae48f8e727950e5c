"""`Teleporter`: move a model to other parameters with the same loss and a larger gradient."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport.capture import Closure, evaluate
from teleport.coverage import Block, Coverage, cover, supported
from teleport.errors import NonFiniteLossError, UnsupportedModelError
from teleport.objective import mean_grad_norm, mean_loss, trainable
from teleport.report import LayerReport, TeleportReport
from teleport.subspace import Basis
from teleport.tangent import Direction, step_to_norm
from teleport.transaction import Transaction
from teleport.walk import FrozenWalk, StreamedWalk, Walk

DEFAULT_GROWTH = 1.5
"""Gradient-norm growth where the user sets no bound: null-space ascent itself has none."""

DEFAULT_MAX_DRIFT = 0.01
"""Relative loss change allowed at tau < 1, where the level set is left by design."""

METHODS = ("tangent", "double_backward")
OBJECTIVES = ("grad_norm",)


class Teleporter:
    """Teleports a model within the level set of a batch's loss (paper Algorithm 1, inner loops).

    Args:
        model: any module with at least one layer in ``teleport.layers.RULES``. Its parameters are
            changed in place, so optimizers made before stay valid.
        tau: share of each layer's input energy that must stay untouched, in (0, 1]. 1 keeps the
            loss to rounding; less frees more directions and lets the loss drift.
        steps: directions taken per batch. Default 1 with ``growth``, 8 (the paper's) with ``lr``.
        lr: fixed step size, the paper's η. The norm is then bounded by ``cap`` or ``growth``; if
            neither is given, by the default growth of 1.5.
        growth: wanted factor on the gradient norm, > 1. Default 1.5 if ``lr`` is not given. The
            step that reaches it is found by an exact line search (``thm-polynomial``).
        cap: upper bound on the gradient norm, > 0 (the paper's CAP).
        objective: ``"grad_norm"``, half the squared gradient norm (paper equation 4).
        method: ``"tangent"`` (fast) or ``"double_backward"`` (the paper's, the reference).
        include: only move layers whose name matches one of these patterns (``fnmatch``).
        exclude: do not move layers whose name matches one of these.
        max_drift: largest relative change of the batch loss; beyond it the model is rolled back.
            Default: rounding at ``tau`` = 1, 0.01 below.
        strict: raise if a layer with parameters is frozen, rather than name it in the report.

    Raises:
        ValueError: for an argument out of range, with its value and the range.
        UnsupportedModelError: if the model has no layer that could move, or if ``strict`` and a
            layer is frozen; the layers are named.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> x, y = torch.randn(16, 8), torch.randint(2, (16,))
        >>> tp = Teleporter(model, growth=2.0)
        >>> report = tp.step(lambda: nn.functional.cross_entropy(model(x), y))
        >>> round(report.growth, 3)
        2.0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tau: float = 1.0,
        steps: int | None = None,
        lr: float | None = None,
        growth: float | None = None,
        cap: float | None = None,
        objective: str = "grad_norm",
        method: str = "tangent",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_drift: float | None = None,
        strict: bool = False,
    ) -> None:
        _check("tau", tau, 0.0 < tau <= 1.0, "in (0, 1]")
        whole = steps is None or (isinstance(steps, int) and steps >= 1)
        _check("steps", steps, whole, "an integer >= 1")
        for name, patterns in (("include", include), ("exclude", exclude)):
            _check(name, patterns, not isinstance(patterns, str), "a list of patterns")
        _check("lr", lr, lr is None or 0.0 < lr < math.inf, "> 0 and finite")
        _check("growth", growth, growth is None or 1.0 < growth < math.inf, "> 1 and finite")
        _check("cap", cap, cap is None or 0.0 < cap < math.inf, "> 0 and finite")
        _check("max_drift", max_drift, max_drift is None or max_drift >= 0.0, ">= 0")
        _check("method", method, method in METHODS, f"one of {METHODS}")
        _check("objective", objective, objective in OBJECTIVES, f"one of {OBJECTIVES}")
        self.model = model
        self.tau = tau
        self.lr = lr
        self.steps = steps if steps is not None else (1 if lr is None else 8)
        self.growth = DEFAULT_GROWTH if growth is None and (lr is None or cap is None) else growth
        self.cap = cap
        self.method = method
        self.max_drift = max_drift
        self._coverage: Coverage = cover(model, at_least_one=True)
        if strict and self._coverage.frozen:
            raise UnsupportedModelError(
                f"strict=True and some layers are frozen:\n{supported(model)}\n"
                "Use strict=False, or add a rule with teleport.layers.register"
            )
        self._movable = _select([b.name for b in self._coverage.blocks], include, exclude)

    def step(
        self, closure: Closure | Sequence[Closure], *, held_out: Closure | None = None
    ) -> TeleportReport:
        """Teleport on one batch.

        Args:
            closure: returns the scalar loss of the teleport batch; must be deterministic and must
                not call ``backward``. A list of closures is one large batch in equal parts: its
                loss is their mean, its input spaces are joined.
            held_out: returns the loss of data the teleport does not see, for the report only.

        Returns:
            What was done. If the loss moved more than allowed, or anything was not finite, the
            model is exactly as before and the report says so.

        Raises:
            ClosureError: if a closure is unusable; the model is exactly as before.
        """
        started = time.perf_counter()
        parts = _parts(closure)
        with Transaction(self.model) as transaction, _unfused():

            def repeatable(closure: Closure) -> Closure:
                def call() -> Any:  # what a user's closure returns is checked where it is used
                    transaction.rewind_random()
                    return closure()

                return call

            held = None if held_out is None else repeatable(held_out)
            attempt = _Attempt(self, [repeatable(part) for part in parts], held)
            report = attempt.run()
            if report.steps and not report.rolled_back:
                transaction.commit()
        spent = time.perf_counter() - started - attempt.held_out_seconds
        return replace(report, seconds=spent)

    def run(
        self, closures: Iterable[Closure], *, held_out: Closure | None = None
    ) -> list[TeleportReport]:
        """Teleport on several batches, one after the other (Algorithm 1's loop over batches)."""
        return [self.step(closure, held_out=held_out) for closure in closures]


@dataclass
class _Outcome:
    """Where an attempt ended: the four numbers of the report that depend on it."""

    loss: float
    norm: float
    held_out: float | None


class _Attempt:
    """One call of `Teleporter.step`, inside its transaction."""

    def __init__(
        self, settings: Teleporter, closures: list[Closure], held_out: Closure | None
    ) -> None:
        self.settings = settings
        self.closures = closures
        self.held_out = held_out
        self.bases: dict[Block, Basis] = {}
        self.step_sizes: list[float] = []
        self.held_out_seconds = 0.0

    def run(self) -> TeleportReport:
        self.walk = self._start_walk()
        before = self._measure_start()
        self.bases = self._make_bases()
        try:
            reason = self._ascend(before.norm)
            after, failure = self._check(before) if self.step_sizes else (before, "")
        except NonFiniteLossError:
            after, failure = before, "the loss became NaN or infinite on the way"
        tolerance = self._tolerance(before)
        return TeleportReport(
            loss_before=before.loss,
            loss_after=before.loss if failure else after.loss,
            grad_norm_before=before.norm,
            grad_norm_after=before.norm if failure else after.norm,
            held_out_before=before.held_out,
            held_out_after=before.held_out if failure else after.held_out,
            tolerance=tolerance,
            steps=len(self.step_sizes),
            step_sizes=tuple(self.step_sizes),
            rolled_back=bool(failure),
            reason=failure or reason,
            seconds=0.0,
            layers=tuple(self._layer_reports(bool(failure))),
        )

    def _measure_start(self) -> _Outcome:
        norm = math.sqrt(self.walk.norm_squared())
        return _Outcome(self.walk.loss, norm, self._held_out_loss())

    def _start_walk(self) -> Walk:
        settings, sites = self.settings, self.settings._coverage.sites
        if settings.tau == 1.0 and len(self.closures) == 1:
            return FrozenWalk(settings.model, sites, self.closures[0])
        return StreamedWalk(settings.model, sites, self.closures, settings._movable)

    def _held_out_loss(self) -> float | None:
        if self.held_out is None:
            return None
        started = time.perf_counter()
        try:
            with torch.no_grad():
                loss = float(evaluate(self.held_out))
        except NonFiniteLossError:
            loss = math.nan  # it is only reported: no reason to undo or to refuse anything
        self.held_out_seconds += time.perf_counter() - started
        return loss

    def _make_bases(self) -> dict[Block, Basis]:
        """Bases of the layers that may move and have room to; full-rank layers are kept for show.

        The tangent direction of a layer whose inputs depend on no parameter is zero, so it needs
        no basis (``thm-fixed``).
        """
        walk, settings = self.walk, self.settings
        skipped = walk.fixed if settings.method == "tangent" else set()
        return {
            block: walk.basis(block, settings.tau)
            for block in walk.start
            if block.name in settings._movable and block not in skipped
        }

    def _ascend(self, start: float) -> str:
        """Take the steps; return why they ended."""
        room = {block: basis for block, basis in self.bases.items() if basis.null_dim > 0}
        if not room:
            return _NO_ROOM
        if start == 0.0:
            return "the gradient is zero: there is nothing to enlarge"
        limit = self._limit(start)
        if limit <= start:
            return f"the gradient norm {start:.6g} is already at the cap {self.settings.cap:.6g}"
        for number in range(1, self.settings.steps + 1):
            along = self._direction(room)
            slope = sum(float(d.double().square().sum()) for d in along.values())
            if slope == 0.0:
                return _FIXED if not self.step_sizes else "a stationary point was reached"
            share = number / self.settings.steps if self.settings.lr is None else 1.0
            step = self._step_size(along, slope, start * (limit / start) ** share)
            if step is None:
                self.walk.look_back()
                return "no step along the ascent direction reaches the wanted gradient norm"
            self.walk.advance(along, step)
            self.step_sizes.append(step)
            if self.settings.lr is not None and step != self.settings.lr:
                return self._limit_reached(limit)
        return self._limit_reached(limit) if self.settings.lr is None else "all steps taken"

    def _step_size(self, along: Direction, slope: float, target: float) -> float | None:
        """The fixed step, or where the norm reaches ``target`` if that comes first."""
        lr, start = self.settings.lr, self.walk.norm_squared()
        if lr is not None and self.walk.norm_squared_at(along, lr) <= target**2:
            return lr
        eps = torch.finfo(self.walk.dtype).eps
        return step_to_norm(
            lambda s: self.walk.norm_squared_at(along, s), start, 2 * slope, target**2, 8 * eps
        )

    def _direction(self, room: dict[Block, Basis]) -> Direction:
        if self.settings.method == "tangent":
            return self.walk.tangent_direction(room)
        return self.walk.double_backward_direction(room)

    def _limit(self, start: float) -> float:
        """The gradient norm the walk must not exceed."""
        settings = self.settings
        by_growth = math.inf if settings.growth is None else settings.growth * start
        return min(by_growth, math.inf if settings.cap is None else settings.cap)

    def _limit_reached(self, limit: float) -> str:
        if self.settings.cap == limit:
            return f"gradient norm reached the cap {limit:.6g}"
        return f"gradient norm reached {self.settings.growth:.6g} x its start"

    def _check(self, before: _Outcome) -> tuple[_Outcome, str]:
        """Measure the new position from scratch; say what is wrong with it, if anything."""
        self.walk.write()
        loss, norm = mean_grad_norm(self.closures, trainable(self.settings.model))
        after = _Outcome(loss, norm, self._held_out_loss())
        if not math.isfinite(norm):
            return after, f"the gradient norm became {norm}"
        drift, allowed = abs(loss - before.loss), self._tolerance(before)
        if drift <= allowed:
            return after, ""
        why = f"the loss moved by {drift:.2e}, more than the allowed {allowed:.2e}"
        self.walk.write_start()
        again = [mean_loss(self.closures) for _ in range(2)]
        if any(abs(other - before.loss) > allowed for other in again):
            why += "; the closure is not deterministic: at the start it now returns another loss"
        return after, why

    def _tolerance(self, before: _Outcome) -> float:
        if self.settings.max_drift is not None:
            return self.settings.max_drift * abs(before.loss)
        if self.settings.tau < 1.0:
            return DEFAULT_MAX_DRIFT * abs(before.loss)
        return self.walk.rounding(self.bases)

    def _layer_reports(self, failed: bool) -> Iterable[LayerReport]:
        coverage = self.settings._coverage
        for block in coverage.blocks:
            yield self._layer_report(block, failed)
        for name, why in coverage.frozen.items():
            yield LayerReport(name, "", None, None, None, None, 0.0, f"frozen: {why}")

    def _layer_report(self, block: Block, failed: bool) -> LayerReport:
        matrix, basis = block.part.matrix(), self.bases.get(block)
        moved = 0.0 if failed else self.walk.move_norm(block)
        return LayerReport(
            name=block.name,
            kind=block.kind,
            d_in=matrix.shape[-1],
            d_out=matrix.shape[-2],
            rank=None if basis is None else basis.rank,
            null_dim=None if basis is None else basis.null_dim,
            move_norm=moved,
            status=self._status(block, failed),
        )

    def _status(self, block: Block, failed: bool) -> str:
        basis = self.bases.get(block)
        if block.name not in self.settings._movable:
            return "excluded"
        if block not in self.walk.start:
            return "frozen: not called, or its weight is also used outside the layer"
        if basis is not None and basis.null_dim == 0:
            return "full rank: no null space"
        if self.walk.move_norm(block) == 0.0:
            return "fixed point" if self.step_sizes or basis is None else "not moved"
        return "rolled back" if failed else "moved"


@contextmanager
def _unfused() -> Iterator[None]:
    """No fused attention: it has neither a forward-mode nor a second derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_NO_ROOM = (
    "nothing can move: no layer has a null space on this batch. Use a smaller batch, tau < 1 or "
    "wider layers"
)
_FIXED = (
    "nothing can move: in every layer with a null space the inputs do not change with the "
    "parameters, or only within their own span"
)


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _parts(closure: Closure | Sequence[Closure]) -> list[Closure]:
    parts = [closure] if callable(closure) else list(closure)
    if not parts:
        raise ValueError("step() needs at least one closure, got an empty list")
    return parts


def _select(
    names: list[str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[str]:
    for pattern in [*(include or ()), *(exclude or ())]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no layer matches {pattern!r}; the model's layers are {names}")

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    wanted = (n for n in names if include is None or matches(n, include))
    return {n for n in wanted if not matches(n, exclude or ())}
