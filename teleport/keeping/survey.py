"""One pass over the old data: the inputs of a model's layers, and the bases of their spans."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from teleport.errors import ClosureError
from teleport.keeping.leading import ENOUGH, leading_basis, single_serves
from teleport.keeping.progress import Track
from teleport.keeping.shared_inputs import SharedSpaces
from teleport.layers.part import LinearMap
from teleport.layers.support import Coverage, WeightMatrix
from teleport.recording import USED_OUTSIDE, watch
from teleport.runtime.closures import require_closure, without_gradients
from teleport.runtime.precision import Autocast
from teleport.runtime.randomness import Quiet, RandomState, drawing_modules, names_of_drawing
from teleport.runtime.ranks import Ranks
from teleport.subspace import Projector, RowSpace, Space, full_basis

OF_ANOTHER_MODEL = "of another model, of other weights, modes or layers"


class Survey:
    """The inputs of a model's layers, and what shows meanwhile: who uses weights, who draws.

    Args:
        model: the model.
        coverage: of it.
        left_out: blocks of the coverage that stay as they are.
        taus: thresholds by the names of the others.
    """

    def __init__(
        self,
        model: nn.Module,
        coverage: Coverage,
        left_out: set[WeightMatrix],
        taus: Mapping[str, float],
    ) -> None:
        self.model, self.taus = model, taus
        self.sites = [site.without(left_out) for site in coverage.sites]
        self.blocks = [block for block in coverage.blocks if block not in left_out]
        self.used: dict[WeightMatrix, str] = {}
        self._forget()

    def add(self, closure: Callable[[], Any], autocast: Autocast, quiet: Quiet) -> None:
        """Take in the inputs that one closure shows.

        The closure is run again if a module draws random numbers: then it was not in evaluation
        mode. What was seen of a first closure is forgotten; of later ones it stays, which only
        keeps more.
        """
        require_closure(closure)
        state = RandomState(self.model)
        while True:
            is_first = not self.seen
            quiet.enforce()
            drawing = drawing_modules(self.model, lambda: self._watch(closure, autocast))
            if not quiet.add(drawing):
                break
            state.restore()
            if is_first:
                self._forget()
        if names := names_of_drawing(self.model, drawing):
            raise ClosureError(
                f"{', '.join(names)}: what it computes is random, even in evaluation mode, so "
                "there is no old function to keep. Draw outside of the model, or give closures "
                "that run only its other layers"
            )

    def bases(self, ranks: Ranks, track: Track) -> tuple[dict[str, Projector], dict[str, str]]:
        """The bases of all that was taken in, on all ranks, and why other layers are frozen.

        Layers with the same inputs and the same threshold have one basis in common.

        Args:
            ranks: who takes part.
            track: goes through what is to be decomposed.
        """
        flags = ranks.most([block in self.used for block in self.blocks])
        used = {
            block.name: self.used.get(block, USED_OUTSIDE).removeprefix("frozen: ")
            for block, flag in zip(self.blocks, flags, strict=True)
            if flag
        }
        free = [block for block in self.blocks if block.name not in used]
        spaces = self.spaces.spaces(free, ranks)
        if not any(space.count for _, space in spaces):
            why = "; ".join(f"{name}: {reason}" for name, reason in used.items())
            raise ClosureError(
                "no closure called a covered layer of this model in a way that can be kept; do "
                f"they call it? {why}".rstrip()
            )
        self._forget()  # so that what is collected goes as bases come
        found: dict[str, Projector] = {}
        for _ in track(range(len(spaces)), "bases"):
            members, space = spaces.pop(0)
            by_tau: dict[float, Projector] = {}
            for block in members:
                tau = self.taus[block.name]
                if tau not in by_tau:
                    by_tau[tau] = _basis(block, space, tau).of_first(ranks)
                found[block.name] = by_tau[tau]
        return {block.name: found[block.name] for block in free}, used

    def state(self) -> dict[str, Any]:
        """All that was taken in, by the names of blocks, for `restore`."""
        used = {block.name: why for block, why in self.used.items()}
        return {"used": used, "groups": self.spaces.state(), "shapes": self._shapes()}

    def restore(self, state: dict[str, Any]) -> str:
        """Take in what `state` told; or why not, if it is of other blocks or less exact."""
        blocks = {block.name: block for block in self.blocks}
        if state.get("shapes") != self._shapes():
            return OF_ANOTHER_MODEL
        groups = [([blocks[n] for n in names], space) for names, space in state["groups"]]
        if any(getattr(space, "single", False) and self._exact(group) for group, space in groups):
            return f"of layers whose tau was at most {ENOUGH:g}, too rough for the one given"
        self.spaces.restore(groups)
        self.used = {blocks[name]: why for name, why in state["used"].items()}
        self.seen = True
        return ""

    def _shapes(self) -> dict[str, list[int]]:
        """Of the matrices: a bias that was frozen meanwhile has no column there."""
        return {block.name: list(block.part.matrix_shape) for block in self.blocks}

    def _exact(self, blocks: Iterable[WeightMatrix]) -> list[WeightMatrix]:
        """Those for whose thresholds float32 does not tell products well enough."""
        widths = {block: block.part.matrix_shape[-1] for block in blocks}
        return [b for b, d_in in widths.items() if not single_serves(self.taus[b.name], d_in)]

    def _forget(self) -> None:
        self.spaces = SharedSpaces(self.blocks, self._exact(self.blocks))
        self.seen = False

    def _watch(self, closure: Callable[[], Any], autocast: Autocast) -> None:
        def see(block: WeightMatrix, part: LinearMap, x: Tensor) -> None:
            with Autocast().off():  # that of the closure, too
                self.spaces.see(block, part, x)

        def run() -> None:
            is_first = not self.seen
            with autocast.on():
                try:
                    self.used |= watch(self.sites, closure, see)
                except RuntimeError:
                    if is_first:
                        self._forget()
                    raise
                finally:
                    self.spaces.settle()
            self.seen = True

        without_gradients(run)


def _basis(block: WeightMatrix, space: Space, tau: float) -> Projector:
    """`WeightMatrix.basis`, by less work where that is enough."""
    if isinstance(space, RowSpace) and space.count:
        with block.named_in_errors():
            found = full_basis(space) if tau == 1.0 else leading_basis(space, tau)
            if found is not None:
                return found
    return block.basis(space, tau)
