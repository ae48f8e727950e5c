"""`Teleporter`: move a model to other parameters with the same loss and a larger gradient."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from teleport.ascent import Ascent, Settings
from teleport.errors import UnsupportedModelError, is_between, require
from teleport.guard import HeldOut
from teleport.layers.support import cover, require_matches, selected, supported
from teleport.line_search import load_search
from teleport.objective import EUCLIDEAN, check_optimizer, metric_of
from teleport.recording import load_tangents
from teleport.report import TeleportReport
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure
from teleport.runtime.precision import Autocast
from teleport.runtime.ranks import silenced
from teleport.runtime.sharded import gathered, without_values
from teleport.runtime.transaction import Transaction
from teleport.runtime.wrappers import is_fully_sharded

DEFAULT_GROWTH = 1.5
"""Gradient-norm growth where the user sets no bound: null-space ascent itself has none."""

METHODS = ("tangent", "double_backward")
OBJECTIVES = ("grad_norm", "preconditioned")


class Teleporter:
    """Teleports a model within the level set of a batch's loss (paper Algorithm 1, inner loops).

    Args:
        model: any module with at least one layer in ``teleport.layers.RULES``. Its parameters are
            changed in place, so optimizers made before stay valid. A model in
            ``DistributedDataParallel`` teleports collectively: every rank calls `step` with its
            own shard, and the loss is the mean of the ranks' losses. So does one of FSDP2
            (``fully_shard``), which is gathered meanwhile: every rank needs room for all of it.
        tau: share of each layer's input energy that must stay untouched, in (0, 1]. 1 keeps the
            loss to rounding; less frees more directions and lets the loss drift.
        steps: directions taken per batch. Default 1 with ``growth``, 8 (the paper's) with ``lr``.
        lr: fixed step size, the paper's η. The norm is then bounded by ``cap`` or ``growth``; if
            neither is given, by the default growth of 1.5.
        growth: wanted factor on the gradient norm, > 1. Default 1.5 if ``lr`` is not given. The
            step that reaches it is found by an exact line search (``thm-polynomial``).
        cap: upper bound on the gradient norm, > 0 (the paper's CAP).
        objective: ``"grad_norm"``, half the squared gradient norm (paper equation 4); or
            ``"preconditioned"``, ``D_M = ½ gᵀ M⁻¹ g`` with the diagonal M by which ``optimizer``
            divides its gradients (``thm-geometry``). ``growth``, ``cap`` and the report then refer
            to ``√(gᵀ M⁻¹ g)``. Where past gradients were almost zero, M⁻¹ is huge and rules.
        optimizer: SGD (M = I), Adam, AdamW, Adagrad or RMSprop, for the preconditioned objective
            only. M is read from its state at every `step` and does not change during it.
        method: ``"tangent"`` (fast) or ``"double_backward"`` (the paper's, the reference).
        include: only move layers whose name matches one of these patterns (``fnmatch``).
        exclude: do not move layers whose name matches one of these.
        max_drift: largest relative change of the batch loss; beyond it the model is rolled back.
            Default: rounding at ``tau`` = 1, 0.01 below.
        strict: raise if a layer with parameters is frozen, rather than name it in the report.

    Raises:
        ValueError: for an argument out of range, with its value and the range; for an optimizer of
            another type, or one that does not hold all trainable parameters.
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
        optimizer: Optimizer | None = None,
        method: str = "tangent",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_drift: float | None = None,
        strict: bool = False,
    ) -> None:
        require("tau", tau, tau == 1.0 or is_between(tau, 0.0, 1.0), "in (0, 1]")
        whole = steps is None or (isinstance(steps, int) and steps >= 1)
        require("steps", steps, whole, "an integer >= 1")
        for name, patterns in (("include", include), ("exclude", exclude)):
            require(name, patterns, not isinstance(patterns, str), "a list of patterns")
        require("lr", lr, lr is None or is_between(lr, 0.0, math.inf), "> 0 and finite")
        require(
            "growth", growth, growth is None or is_between(growth, 1.0, math.inf), "> 1 and finite"
        )
        require("cap", cap, cap is None or is_between(cap, 0.0, math.inf), "> 0 and finite")
        known = max_drift in (None, 0.0, math.inf) or is_between(max_drift, 0.0, math.inf)
        require("max_drift", max_drift, known, ">= 0")
        require("method", method, method in METHODS, f"one of {METHODS}")
        require("objective", objective, objective in OBJECTIVES, f"one of {OBJECTIVES}")
        require(
            "optimizer",
            optimizer,
            (optimizer is None) == (objective == "grad_norm"),
            "given with objective='preconditioned', and only then",
        )
        self.model, self._optimizer = model, optimizer
        self._include, self._exclude, self._strict = include, exclude, strict
        with without_values(model):
            moving = self._moving()
        names = [block.name for block in moving["coverage"].blocks]
        require_matches(names, [*(include or ()), *(exclude or ())])
        if optimizer is not None:
            if is_fully_sharded(model):
                raise UnsupportedModelError(
                    "objective='preconditioned' reads the state of the optimizer, which FSDP2 "
                    "shards; use objective='grad_norm', or DistributedDataParallel"
                )
            check_optimizer(optimizer, model)
        unbounded = growth is None and (lr is None or cap is None)
        self._settings = Settings(
            model=model,
            **moving,
            tau=tau,
            steps=steps if steps is not None else (1 if lr is None else 8),
            lr=lr,
            growth=DEFAULT_GROWTH if unbounded else growth,
            cap=cap,
            method=method,
            max_drift=max_drift,
        )
        load_search()  # now, so that the first step takes no longer than the second
        load_tangents()

    def step(
        self, closure: Closure | Sequence[Closure], *, held_out: Closure | None = None
    ) -> TeleportReport:
        """Teleport on one batch.

        Args:
            closure: returns the scalar loss of the teleport batch; must be deterministic and must
                not call ``backward``. Modules that draw random numbers in train mode are in
                evaluation mode meanwhile. A list of closures is one large batch in equal parts: its
                loss is their mean, its input spaces are joined.
            held_out: returns the loss of data the teleport does not see, for the report only.

        Returns:
            What was done. If the loss moved more than allowed, or anything was not finite, the
            model is exactly as before and the report says so.

        Raises:
            ClosureError: if a closure is unusable; the model is exactly as before.
            OptimizerStateError: if the optimizer has taken no step yet, or its state gives no
                preconditioner; likewise.
        """
        started = now()
        autocast = Autocast()
        with (
            torch.inference_mode(False),
            gathered(self.model) as ranks,
            autocast.off(),
            ranks.together(),
            silenced(self.model),
            Transaction(self.model) as transaction,
        ):
            parts = _parts(closure)
            settings = replace(self._settings, **self._moving())
            ranks.require_same(_request(settings, self._optimizer, held_out))

            def repeatable(closure: Closure) -> Closure:
                def call() -> Any:  # what a user's closure returns is checked where it is used
                    with autocast.on():
                        return closure()

                return transaction.repeatable(call)

            held = HeldOut(None if held_out is None else repeatable(held_out), ranks)
            closures = [repeatable(part) for part in parts]
            optimizer = self._optimizer
            metric = EUCLIDEAN if optimizer is None else metric_of(optimizer, self.model)
            ascent = Ascent(settings, closures, held, ranks, metric)
            with ranks.together():  # before anything is kept
                report, note = transaction.until_quiet(ascent.run)
            if report.steps and not report.rolled_back:
                transaction.commit()
        spent = now() - started - held.seconds
        return replace(report, seconds=spent, reason=report.reason + note)

    def _moving(self) -> dict[str, Any]:
        """What is covered and may move now: layers may have been frozen, freed or wrapped since."""
        coverage = cover(self.model, at_least_one=True)
        if self._strict and coverage.frozen:
            raise UnsupportedModelError(
                f"strict=True and some layers are frozen:\n{supported(self.model)}\n"
                "Use strict=False, or add a rule with teleport.layers.register"
            )
        names = [block.name for block in coverage.blocks]
        return {"coverage": coverage, "movable": selected(names, self._include, self._exclude)}

    def run(
        self, closures: Iterable[Closure], *, held_out: Closure | None = None
    ) -> list[TeleportReport]:
        """Teleport on several batches, one after the other (Algorithm 1's loop over batches)."""
        return [self.step(closure, held_out=held_out) for closure in closures]


def _request(s: Settings, optimizer: Optimizer | None, held_out: Closure | None) -> str:
    """What is asked for, in the same words on all ranks that ask for the same."""
    names = [(b.name, tuple(b.part.matrix().shape)) for b in s.coverage.blocks]
    asked = (s.tau, s.steps, s.lr, s.growth, s.cap, s.method, s.max_drift, sorted(s.movable))
    by, held = type(optimizer).__name__, "not " if held_out is None else ""
    return f"{asked}, optimizer {by}, held_out {held}given, {names}"


def _parts(closure: Closure | Sequence[Closure]) -> list[Closure]:
    parts = [closure] if callable(closure) else list(closure)
    if not parts:
        raise ValueError("step() needs at least one closure, got an empty list")
    return parts
