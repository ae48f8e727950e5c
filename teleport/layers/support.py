"""Which layers of a model teleportation covers, and why it leaves the others alone."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from teleport.errors import NonFiniteInputError, UnsupportedModelError
from teleport.layers.part import LinearMap, ParameterSlice
from teleport.layers.rule import RULES, LayerRule, rule_for
from teleport.layers.shared_weight import TiedSpace
from teleport.report import text_table
from teleport.runtime.precision import PRECISIONS
from teleport.runtime.wrappers import named_modules
from teleport.subspace import Projector, Space


@dataclass(eq=False, frozen=True)
class WeightMatrix:
    """One weight matrix of the model. Layers that share all of it share the block.

    Attributes:
        name: module and part it is found at first, ``"encoder.attn.q"``.
        kind: layer type, of its rule.
        part: reads and writes the matrix.
        other: uses the transpose of the weight, as an embedding whose table is also the head.
    """

    name: str
    kind: str
    part: LinearMap
    other: LinearMap | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters the matrix is made of, or of rows of."""
        return self.part.parameters

    def gradient_from(self, part: LinearMap, gradient: Tensor) -> Tensor:
        """A gradient in the matrix of one of its parts, in its own; a bias gets none from other."""
        if part is not self.other:
            return gradient
        rest = (torch.zeros_like(s.of(s.parameter)).detach() for s in self.part.slots[1:])
        return self.part.join([*part.split(gradient), *rest])

    def space(self) -> Space:
        """An empty collector of its inputs."""
        own = self.part.space()
        return own if self.other is None else TiedSpace(own, self.other.space())

    def collect(self, space: Any, part: LinearMap, x: Tensor) -> None:
        """Add the input of one of its parts."""
        if self.other is not None:
            space = space.other if part is self.other else space.own
        part.collect(space, x)

    def basis(self, space: Any, tau: float) -> Projector:
        """The projector of what was collected; a use that no data reached is free."""
        sides = [(self.part, space)]
        if self.other is not None:
            sides = [(self.part, space.own), (self.other, space.other)]
        for part, side in sides:
            if side.count == 0:
                part.collect_none(side)
        with self.named_in_errors():
            basis: Projector = space.basis(tau)
        return basis

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Where inputs turn out not to be finite, say whose."""
        try:
            yield
        except NonFiniteInputError:
            raise NonFiniteInputError(self.name) from None


CoveredProduct = Callable[[WeightMatrix, LinearMap, Tensor], Tensor]
"""``product(block, part, x)``: ``W x + b`` with the matrix of a block, used by one of its parts."""


@dataclass(eq=False, frozen=True)
class CoveredModule:
    """A module whose forward pass is covered.

    Attributes:
        module: whose forward pass is rewritten.
        rule: how.
        parts: the module's weight matrices, by name.
        covered: of those that may move, the block and the part of it that stands for the matrix.
    """

    module: nn.Module
    rule: LayerRule[Any]
    parts: dict[str, LinearMap]
    covered: dict[str, tuple[WeightMatrix, LinearMap]] = field(default_factory=dict)

    def forward(self, product: CoveredProduct, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with every covered matrix left to ``product``."""

        def apply(name: str, x: Tensor) -> Tensor:
            if name in self.covered:
                return product(*self.covered[name], x)
            return self.parts[name].compute(x)

        return self.rule.forward(self.module, apply, *args, **kwargs)

    @property
    def blocks(self) -> list[WeightMatrix]:
        """What is covered, in the order of the parts."""
        return [block for block, _ in self.covered.values()]

    def without(self, left_out: Collection[WeightMatrix]) -> "CoveredModule":
        """The same site with some of its blocks computed as the module does itself."""
        kept = {name: pair for name, pair in self.covered.items() if pair[0] not in left_out}
        return replace(self, covered=kept)


@dataclass(frozen=True)
class Coverage:
    """What of a model teleportation covers.

    Attributes:
        sites: the modules whose forward pass is rewritten.
        blocks: their weight matrices, each once, in the order of ``named_modules``.
        frozen: for every other module that holds parameters its name and the reason.
    """

    sites: list[CoveredModule]
    blocks: list[WeightMatrix]
    frozen: dict[str, str]


def cover(model: nn.Module, at_least_one: bool = False) -> Coverage:
    """Find the layers teleportation can cover, and why it leaves the others alone.

    Args:
        model: any module.
        at_least_one: refuse a model without any such layer.

    Raises:
        UnsupportedModelError: for such a model, naming its layers.

    Returns:
        Sites, blocks and reasons. Layers that share a whole weight matrix share a block, as do one
        that holds a weight upright and one that holds its transpose; layers that share a parameter
        in any other way are frozen.
    """
    found, frozen = _find(model)
    conflicts, ties = _shared(model, found)
    covered: dict[Any, tuple[WeightMatrix, LinearMap]] = {}
    in_one_memory = _in_one_memory(model)
    for name, site in found.items():
        for part in site.parts.values():
            full = ".".join(filter(None, (name, part.name)))
            if part.key in conflicts:
                frozen[full] = "shares a parameter with another layer in part"
            elif not in_one_memory.isdisjoint(slot.parameter for slot in part.slots):
                frozen[full] = "it shares its memory with another parameter"
            elif why := _why_weights_stay(part):
                frozen[full] = why
            elif part.key not in covered:
                covered |= _new_block(full, site.rule.kind, part, ties)
    blocks = list(dict.fromkeys(block for block, _ in covered.values()))
    if at_least_one and not blocks:
        raise UnsupportedModelError(_no_layer(model, frozen))
    return Coverage([_with(site, covered) for site in found.values()], blocks, frozen)


def _with(site: CoveredModule, covered: dict[Any, tuple[WeightMatrix, LinearMap]]) -> CoveredModule:
    mine = {n: covered[part.key] for n, part in site.parts.items() if part.key in covered}
    return replace(site, covered=mine)


def _in_one_memory(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that are different objects and have memory in common."""
    extents = sorted(
        (extent(p), n, p)
        for n, p in enumerate(model.parameters())
        if p.layout == torch.strided and not p.is_meta and p.numel()
    )
    found: set[nn.Parameter] = set()
    end, last = 0, None
    for (start, stop), _, parameter in extents:
        if last is not None and start < end:
            found |= {last, parameter}
        if stop > end:
            end, last = stop, parameter
    return found


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's memory and the one after the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _find(model: nn.Module) -> tuple[dict[str, CoveredModule], dict[str, str]]:
    """Modules with a rule, and for all others with parameters why there is none that serves."""
    found: dict[str, CoveredModule] = {}
    frozen: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for name, module in named_modules(model):
        if module in inside:
            continue
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise UnsupportedModelError(
                f"layer {name!r} ({type(module).__name__}) has no weights yet; run the model once, "
                "so that it learns its sizes"
            )
        rule = rule_for(module)
        if rule is not None:
            inside.update(module.children())  # what a layer is made of, its rule answers for
            parts = {part.name: part for part in rule.parts(module)}
            if why := rule.obstacle(module) or _obstacle(module, list(parts.values())):
                frozen[name] = why
            else:
                found[name] = CoveredModule(module, rule, parts)
        elif list(module.parameters(recurse=False)):
            frozen[name] = f"no rule for {type(module).__name__}"
        elif hasattr(module, "_packed_params"):  # PyTorch's quantised layers have no parameters
            frozen[name] = f"the weight of {type(module).__name__} is quantised"
            inside.update(module.children())
    return found, frozen


def _new_block(
    name: str, kind: str, part: LinearMap, ties: dict[Any, LinearMap]
) -> dict[Any, tuple[WeightMatrix, LinearMap]]:
    """The block found first at this part, by part; the upright one of a tied pair leads."""
    other = ties.get(part.key)
    if other is None:
        return {part.key: (WeightMatrix(name, kind, part), part)}
    lead, follow = (part, other) if part.orientation == "upright" else (other, part)
    block = WeightMatrix(name, f"{kind}, tied", lead, follow)
    return {lead.key: (block, lead), follow.key: (block, follow)}


def _why_weights_stay(part: LinearMap) -> str:
    """Why this part must not move, though its layer can be covered; empty if it may."""
    weights = [slot.parameter for slot in part.slots]
    if not weights[0].requires_grad:
        return NO_GRADIENT
    if any(weight.is_complex() for weight in weights):
        return "its weight is complex"
    if weights[0].dtype not in (*PRECISIONS, torch.complex64, torch.complex128):
        return f"its weight is {weights[0].dtype}, in which nothing is computed"
    if any(weight.is_inference() for weight in weights):
        return "its weight was made in inference mode"
    strides = (zip(w.shape, w.stride(), strict=True) for w in weights if w.layout == torch.strided)
    if any(size > 1 and step == 0 for each in strides for size, step in each):
        return "entries of its weight or bias share memory, as expand() leaves them: clone() it"
    if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in weights):
        return "a gradient hook on its weight or bias changes what training sees"
    return ""


NO_GRADIENT = "its weight does not require a gradient"


def _no_layer(model: nn.Module, frozen: dict[str, str]) -> str:
    kinds = ", ".join(sorted(t.__name__ for t in RULES))
    found = "; ".join(f"{name or '(model)'}: {why}" for name, why in frozen.items())
    return (
        f"{type(model).__name__} has no layer that can move. Covered are {kinds}; a rule for "
        f"another type is added with teleport.layers.register. Found: {found or 'no parameters'}"
    )


def _obstacle(module: nn.Module, parts: Sequence[LinearMap]) -> str:
    """Why a module with a rule can still not be covered; empty if it can."""
    if "forward" in module.__dict__:
        return "its forward method has been replaced"
    own = set(module.parameters())
    if not all(slot.parameter in own for part in parts for slot in part.slots):
        return "its weight is computed from other parameters"
    return ""


def _shared(
    model: nn.Module, found: dict[str, CoveredModule]
) -> tuple[set[Any], dict[Any, LinearMap]]:
    """Keys of parts that share a parameter with anything but an equal part.

    The second of the two holds those that may: an upright part and a transposed one that share a
    whole weight and nothing else, each with the other. The first holds all others.
    """
    with_rule = {part for site in found.values() for part in site.module.modules()}
    native = {
        parameter
        for module in model.modules()
        if module not in with_rule
        for parameter in module.parameters(recurse=False)
    }
    holders: dict[nn.Parameter, dict[Any, tuple[LinearMap, ParameterSlice]]] = {}
    for site in found.values():
        for part in site.parts.values():
            for slot in part.slots:
                holders.setdefault(slot.parameter, {})[part.key] = part, slot
    conflicts: set[Any] = set()
    ties: dict[Any, LinearMap] = {}
    for parameter, parts in holders.items():
        if parameter in native:
            conflicts |= set(parts)
        for (one, (a, a_slot)), (other, (b, b_slot)) in combinations(parts.items(), 2):
            if a_slot.overlaps(b_slot):
                if len(parts) == 2 and _can_tie(a, b):
                    ties |= {one: b, other: a}
                else:
                    conflicts |= {one, other}
    conflicts |= {tied.key for key, tied in ties.items() if key in conflicts}
    return conflicts, {key: tied for key, tied in ties.items() if key not in conflicts}


def _can_tie(a: LinearMap, b: LinearMap) -> bool:
    """Whether two parts hold one weight, one of them upright and the other, alone, transposed."""
    upright, transposed = sorted((a, b), key=lambda part: part.orientation, reverse=True)
    return (
        (upright.orientation, transposed.orientation) == ("upright", "transposed")
        and upright.weight.key == transposed.weight.key
        and not transposed.has_bias_column
    )


def selected(
    names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[str]:
    """The names that match a pattern of ``include`` (all by default) and none of ``exclude``."""

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    wanted = (name for name in names if include is None or matches(name, include))
    return {name for name in wanted if not matches(name, exclude or ())}


def require_matches(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise ValueError for a pattern that matches none of the names."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"a pattern is a text, as {str(pattern)!r}, got {pattern!r}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no layer matches {pattern!r}; the model's layers are {names}")


@dataclass(frozen=True)
class Support:
    """What `supported` found, as a table: ``(name, kind, parameters, verdict)`` per layer."""

    lines: tuple[tuple[str, str, int, str], ...]

    @property
    def moves(self) -> list[str]:
        """Names of the layers that could move."""
        return [name for name, _, _, verdict in self.lines if verdict == "can move"]

    @property
    def frozen(self) -> dict[str, str]:
        """Names of the other layers and why they stay."""
        return {name: verdict for name, _, _, verdict in self.lines if verdict != "can move"}

    def __str__(self) -> str:
        rows = [("layer", "kind", "parameters", "verdict")]
        rows += [(n or "(model)", k, f"{count:,}", why) for n, k, count, why in self.lines]
        return "\n".join(text_table(rows))


def supported(model: nn.Module) -> Support:
    """Tell, before anything runs, which layers could move, which are frozen, and why.

    Whether a layer that can move does so depends on the batch: its inputs must leave a null space
    and depend on earlier parameters (``thm-fixed``).

    Args:
        model: any module.

    Returns:
        A table; print it.
    """
    coverage = cover(model)
    lines = []
    for block in coverage.blocks:
        count = sum(piece.numel() for piece in block.part.pieces())
        lines.append((block.name, block.kind, count, "can move"))
    modules = dict(named_modules(model))
    for name, why in coverage.frozen.items():
        module = modules.get(name)
        kind = type(module).__name__ if module is not None else "part"
        own = module.parameters(recurse=False) if module is not None else ()
        lines.append((name, kind, sum(p.numel() for p in own), f"frozen: {why}"))
    return Support(tuple(lines))
