"""`Teleporter`: move a model to other parameters with the same loss and a larger gradient."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport.ascent import Ascent, Settings
from teleport.bounds.saving import Decision, not_moved
from teleport.errors import UnsupportedModelError, is_between, require
from teleport.guard import HeldOut, Standing
from teleport.layers.support import cover, require_matches, selected, supported
from teleport.line_search import load_search
from teleport.objective import EUCLIDEAN, check_optimizer, metric_of
from teleport.recording import load_tangents
from teleport.report import TeleportReport
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure, closures_of, require_closure
from teleport.runtime.memory import keep_freed_memory
from teleport.runtime.precision import Autocast
from teleport.runtime.ranks import Ranks, ranks_of, silenced
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
            step that reaches it is found by an exact line search (``thm-polynomial``): to rounding
            in double precision, in single precision the norm is right to 3e-4. ``"auto"``:
            whether to teleport at all and how far is decided at every `step` from what is measured
            there (``thm-saving``); needs ``optimizer``, whose steps are counted from now on. The
            answer is mostly no, and the report says why.
        cap: upper bound on the gradient norm, > 0 (the paper's CAP).
        objective: ``"grad_norm"``, half the squared gradient norm (paper equation 4); or
            ``"preconditioned"``, ``D_M = ½ gᵀ M⁻¹ g`` with the diagonal M by which ``optimizer``
            divides its gradients (``thm-geometry``). ``growth``, ``cap`` and the report then refer
            to ``√(gᵀ M⁻¹ g)``. Where past gradients were almost zero, M⁻¹ is huge and rules.
        optimizer: SGD (M = I), Adam, AdamW, Adagrad or RMSprop, for the preconditioned objective
            and for ``growth="auto"``. M is read from its state at every `step` and does not change
            during it.
        method: ``"tangent"`` (fast) or ``"double_backward"`` (the paper's, the reference).
        include: only move layers whose name matches one of these patterns (``fnmatch``).
        exclude: do not move layers whose name matches one of these.
        max_drift: largest relative change of the batch loss; beyond it the model is rolled back.
            Default: rounding at ``tau`` = 1, 0.01 below.
        strict: raise if a layer with parameters is frozen, rather than name it in the report.
        budget: largest share of the training time so far that ``growth="auto"`` may spend, in
            (0, 1]; the first teleport, of unknown cost, may exceed it. Unused otherwise.

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
        growth: float | Literal["auto"] | None = None,
        cap: float | None = None,
        objective: str = "grad_norm",
        optimizer: Optimizer | None = None,
        method: str = "tangent",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_drift: float | None = None,
        strict: bool = False,
        budget: float = 0.02,
    ) -> None:
        require("tau", tau, tau == 1.0 or is_between(tau, 0.0, 1.0), "in (0, 1]")
        whole = steps is None or (isinstance(steps, int) and steps >= 1)
        require("steps", steps, whole, "an integer >= 1")
        for name, patterns in (("include", include), ("exclude", exclude)):
            texts = patterns is None or all(isinstance(pattern, str) for pattern in patterns)
            require(name, patterns, texts and not isinstance(patterns, str), "a list of patterns")
        require("lr", lr, lr is None or is_between(lr, 0.0, math.inf), "> 0 and finite")
        auto = growth == "auto"
        fits = auto or growth is None or is_between(growth, 1.0, math.inf)
        require("growth", growth, fits, '> 1 and finite, or "auto"')
        for name, value in (("lr", lr), ("cap", cap)) if auto else ():
            require(name, value, value is None, 'left out beside growth="auto", which decides')
        require("budget", budget, budget == 1.0 or is_between(budget, 0.0, 1.0), "in (0, 1]")
        require("cap", cap, cap is None or is_between(cap, 0.0, math.inf), "> 0 and finite")
        known = max_drift in (None, 0.0, math.inf) or is_between(max_drift, 0.0, math.inf)
        require("max_drift", max_drift, known, ">= 0")
        require("method", method, method in METHODS, f"one of {METHODS}")
        require("objective", objective, objective in OBJECTIVES, f"one of {OBJECTIVES}")
        require(
            "optimizer",
            optimizer,
            (optimizer is None) == (objective == "grad_norm" and not auto),
            "given with objective='preconditioned' and with growth='auto', and only then",
        )
        self.model, self._optimizer = model, optimizer
        self._include, self._exclude, self._strict = include, exclude, strict
        with without_values(model):
            moving = self._moving()
        names = [block.name for block in moving["coverage"].blocks]
        require_matches(names, [*(include or ()), *(exclude or ())])
        self._decision = None
        if optimizer is not None:
            if is_fully_sharded(model):
                raise UnsupportedModelError(
                    "objective='preconditioned' and growth='auto' read the state of the "
                    "optimizer, which FSDP2 shards; use neither, or DistributedDataParallel"
                )
            check_optimizer(optimizer, model)
            self._decision = Decision(model, optimizer, budget) if auto else None
        self._preconditioned = objective == "preconditioned"
        unbounded = growth is None and (lr is None or cap is None)
        self._settings = Settings(
            model=model,
            **moving,
            tau=tau,
            steps=steps if steps is not None else (1 if lr is None else 8),
            lr=lr,
            growth=DEFAULT_GROWTH if unbounded or growth == "auto" else growth,
            cap=cap,
            method=method,
            max_drift=max_drift,
        )
        load_search()  # now, so that the first step takes no longer than the second
        load_tangents()
        keep_freed_memory()

    def step(
        self, closure: Closure | Sequence[Closure], *, held_out: Closure | None = None
    ) -> TeleportReport:
        """Teleport on one batch.

        Args:
            closure: returns the scalar loss of the teleport batch; must be deterministic and must
                not call ``backward``. Modules that draw random numbers in train mode are in
                evaluation mode meanwhile. A list of closures is one large batch in equal parts: its
                loss is their mean, its input spaces are joined.
            held_out: returns the loss of data the teleport does not see, for the report; with
                ``growth="auto"`` a teleport that costs it more than it saves is undone.

        Returns:
            What was done. If the loss moved more than allowed, or anything was not finite, the
            model is exactly as before and the report says so.

        Raises:
            ClosureError: if a closure is unusable; the model is exactly as before.
            OptimizerStateError: if the optimizer has taken no step yet, or its state gives no
                preconditioner; likewise.
        """
        started = now()
        if self._decision is not None and (reason := self._decision.waiting(ranks_of(self.model))):
            return not_moved(reason, None)
        autocast = Autocast()
        with (
            torch.inference_mode(False),
            _together(self.model) as ranks,
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

            held_out = None if held_out is None else require_closure(held_out)
            held = HeldOut(None if held_out is None else repeatable(held_out), ranks)
            closures = [repeatable(part) for part in parts]

            def move() -> TeleportReport:
                return self._move(settings, closures, held, ranks, transaction.kept)

            with ranks.together():  # before anything is kept
                report, note = transaction.until_quiet(move)
            if report.steps and not report.rolled_back:
                transaction.commit()
        spent = now() - started - held.seconds
        if self._decision is not None:
            self._decision.spend(spent, moved=report.steps > 0)
        return replace(report, seconds=spent, reason=report.reason + note)

    def _move(
        self,
        settings: Settings,
        closures: Sequence[Closure],
        held: HeldOut,
        ranks: Ranks,
        kept: Mapping[nn.Parameter, Tensor],
    ) -> TeleportReport:
        optimizer, decision = self._optimizer, self._decision
        metric = EUCLIDEAN
        if optimizer is not None and self._preconditioned:
            metric = metric_of(optimizer, self.model)
        if decision is None:
            return Ascent(settings, closures, held, ranks, metric, kept).run()
        if refusal := decision.refusal(closures, ranks):
            return not_moved(refusal, decision.trial)
        settings = replace(settings, growth=decision.growth)

        def object_to(before: Standing, after: Standing) -> str:
            return decision.objection(closures, ranks, before.held_out, after.held_out)

        report = Ascent(settings, closures, held, ranks, metric, kept, object_to).run()
        return replace(report, reason=f"{report.reason}; {decision.told}")

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
        return [self.step(closure, held_out=held_out) for closure in closures_of(closures)]


def _together(model: nn.Module) -> AbstractContextManager[Ranks]:
    """Who teleports together; a model of FSDP2 is a plain one meanwhile."""
    return gathered(model) if is_fully_sharded(model) else nullcontext(ranks_of(model))


def _request(s: Settings, optimizer: Optimizer | None, held_out: Closure | None) -> str:
    """What is asked for, in the same words on all ranks that ask for the same."""
    names = [(b.name, tuple(b.part.matrix_shape)) for b in s.coverage.blocks]
    asked = (s.tau, s.steps, s.lr, s.growth, s.cap, s.method, s.max_drift, sorted(s.movable))
    by, held = type(optimizer).__name__, "not " if held_out is None else ""
    return f"{asked}, optimizer {by}, held_out {held}given, {names}"


def _parts(closure: Closure | Sequence[Closure]) -> list[Closure]:
    parts = list(map(require_closure, closures_of(closure)))
    if not parts:
        raise ValueError("step() needs at least one closure, got an empty list")
    return parts
