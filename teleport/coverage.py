"""Which layers of a model teleportation covers, and why it leaves the others alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from teleport.errors import UnsupportedModelError
from teleport.layers import RULES, LayerRule, Part, Slot, rule_for


@dataclass(eq=False, frozen=True)
class Block:
    """One weight matrix of the model. Layers that share all of it share the block.

    Attributes:
        name: module and part it is found at first, ``"encoder.attn.q"``.
        kind: layer type, of its rule.
        part: reads and writes the matrix.
    """

    name: str
    kind: str
    part: Part

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters the matrix is made of, or of rows of."""
        return tuple(slot.parameter for slot in self.part.slots)


@dataclass(eq=False, frozen=True)
class Site:
    """A module whose forward pass is covered: its rule, its parts, the block of each part."""

    module: nn.Module
    rule: LayerRule[Any]
    parts: dict[str, Part]
    blocks: dict[str, Block]

    def forward(self, apply: Callable[[Block, Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with every covered product left to ``apply(block, x)``."""

        def product(name: str, x: Tensor) -> Tensor:
            block = self.blocks.get(name)
            return self.parts[name].compute(x) if block is None else apply(block, x)

        return self.rule.forward(self.module, product, *args, **kwargs)

    def without(self, left_out: set[Block]) -> "Site":
        """The same site with some of its blocks computed as the module does itself."""
        kept = {name: block for name, block in self.blocks.items() if block not in left_out}
        return Site(self.module, self.rule, self.parts, kept)


@dataclass(frozen=True)
class Coverage:
    """What of a model teleportation covers.

    Attributes:
        sites: the modules whose forward pass is rewritten.
        blocks: their weight matrices, each once, in the order of ``named_modules``.
        frozen: for every other module that holds parameters its name and the reason.
    """

    sites: list[Site]
    blocks: list[Block]
    frozen: dict[str, str]


_Found = tuple[str, nn.Module, LayerRule[Any], dict[str, Part]]


def cover(model: nn.Module, at_least_one: bool = False) -> Coverage:
    """Find the layers teleportation can cover, and why it leaves the others alone.

    Args:
        model: any module.
        at_least_one: refuse a model without any such layer.

    Raises:
        UnsupportedModelError: for such a model, naming its layers.

    Returns:
        Sites, blocks and reasons. Layers that share a whole weight matrix share a block; layers
        that share a parameter in any other way are frozen.
    """
    parallel = parallel_part(model)
    model = model if parallel is None else parallel.module
    found: list[_Found] = []
    frozen: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        own = list(module.parameters(recurse=False))
        rule = rule_for(module)
        if rule is not None:
            inside.update(module.children())  # what a layer is made of, its rule answers for
            parts = {part.name: part for part in rule.parts(module)}
            if why := _obstacle(module, list(parts.values())):
                frozen[name] = why
            else:
                found.append((name, module, rule, parts))
        elif own:
            frozen[name] = f"no rule for {type(module).__name__}"
    conflicts = _conflicts(model, found)
    blocks: dict[Any, Block] = {}
    sites = []
    for name, module, rule, parts in found:
        mine = {}
        for part in parts.values():
            full = _join(name, part.name)
            if part.key in conflicts:
                frozen[full] = "shares a parameter with another layer in part"
            elif not part.weight.parameter.requires_grad:
                frozen[full] = "its weight does not require a gradient"
            else:
                mine[part.name] = blocks.setdefault(part.key, Block(full, rule.kind, part))
        sites.append(Site(module, rule, parts, mine))
    if at_least_one and not blocks:
        raise UnsupportedModelError(_no_layer(model, frozen))
    return Coverage(sites, list(blocks.values()), frozen)


def parallel_part(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper, if the model is in `DistributedDataParallel`; names leave it out.

    Raises:
        UnsupportedModelError: for other ways to spread a model, with what to do.
    """
    whole = getattr(model, "_orig_mod", model)  # compiled, after it was wrapped
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel) and module is not whole:
            raise UnsupportedModelError(
                "a part of the model is in DistributedDataParallel; wrap the whole model"
            )
        if isinstance(module, nn.DataParallel):
            raise UnsupportedModelError(
                "nn.DataParallel runs copies of the layers; teleport model.module and call that "
                "in the closure, or use DistributedDataParallel"
            )
        if kind == "FullyShardedDataParallel" or any(
            type(p).__name__ in ("DTensor", "FlatParameter")
            for p in module.parameters(recurse=False)
        ):
            raise UnsupportedModelError(
                "the model's parameters are sharded (FSDP or DTensor): no rank holds a whole "
                "weight matrix. Use DistributedDataParallel, or gather the parameters into a "
                "plain copy of the model, teleport that, and load its state_dict back"
            )
    return whole if isinstance(whole, DistributedDataParallel) else None


def _no_layer(model: nn.Module, frozen: dict[str, str]) -> str:
    kinds = ", ".join(sorted(t.__name__ for t in RULES))
    found = "; ".join(f"{name or '(model)'}: {why}" for name, why in frozen.items())
    return (
        f"{type(model).__name__} has no layer that can move. Covered are {kinds}; a rule for "
        f"another type is added with teleport.layers.register. Found: {found or 'no parameters'}"
    )


def _join(module: str, part: str) -> str:
    return ".".join(name for name in (module, part) if name)


def _obstacle(module: nn.Module, parts: Sequence[Part]) -> str:
    """Why a module with a rule can still not be covered; empty if it can."""
    if "forward" in module.__dict__:
        return "its forward method has been replaced"
    own = set(module.parameters())
    if not all(slot.parameter in own for part in parts for slot in part.slots):
        return "its weight is computed from other parameters"
    return ""


def _conflicts(model: nn.Module, found: Sequence[_Found]) -> set[Any]:
    """Keys of parts that share a parameter, or rows of it, with anything but an equal part."""
    with_rule = {part for _, module, _, _ in found for part in module.modules()}
    native = {
        parameter
        for module in model.modules()
        if module not in with_rule
        for parameter in module.parameters(recurse=False)
    }
    uses: dict[nn.Parameter, dict[Any, Slot]] = {}
    for _, _, _, parts in found:
        for part in parts.values():
            for slot in part.slots:
                uses.setdefault(slot.parameter, {})[part.key] = slot
    conflicts: set[Any] = set()
    for parameter, slots in uses.items():
        for (one, a), (other, b) in combinations(slots.items(), 2):
            if a.overlaps(b):
                conflicts |= {one, other}
        if parameter in native:
            conflicts |= set(slots)
    return conflicts


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
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = (
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        )
        return "\n".join(table)


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
    lines = [
        (
            block.name,
            block.kind,
            sum(slot.of(slot.parameter).numel() for slot in block.part.slots),
            "can move",
        )
        for block in coverage.blocks
    ]
    parallel = parallel_part(model)
    modules = dict((model if parallel is None else parallel.module).named_modules())
    for name, why in coverage.frozen.items():
        module = modules.get(name)
        kind = type(module).__name__ if module is not None else "part"
        own = module.parameters(recurse=False) if module is not None else ()
        lines.append((name, kind, sum(p.numel() for p in own), f"frozen: {why}"))
    return Support(tuple(lines))
