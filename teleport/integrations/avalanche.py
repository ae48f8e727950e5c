"""The null space as a plugin of Avalanche's strategies: `NullSpacePlugin`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from teleport.errors import require
from teleport.keeping.choice import Tau
from teleport.keeping.keeper import Attachment
from teleport.keeping.null_space import NullSpace, null_space
from teleport.layers.support import cover

try:
    from avalanche.core import SupervisedPlugin
except ImportError as error:
    raise ImportError(
        "teleport.integrations.avalanche needs Avalanche: "
        f"pip install 'nullspace-teleport[avalanche]' ({error})"
    ) from error


class NullSpacePlugin(SupervisedPlugin):  # type: ignore[misc]  # Avalanche may not be installed
    """Keeps what a model does on earlier experiences while it learns later ones.

    After each experience the `teleport.null_space` of its data is made, in evaluation mode and by
    the strategy's own ``forward``, and merged with what was kept. From the next experience on it
    is attached to the strategy's optimizer: whatever optimizer it is, the outputs on the earlier
    data stay, exactly at ``tau`` = 1 (``thm-keep``). Layers that no earlier data reached, as the
    heads of later tasks, learn freely; layers without a rule, as BatchNorm, stay as they are after
    the first experience. Memory: one batch of data at a time, and a basis for each layer.

    Args:
        tau: share of each layer's input energy to keep, as in `teleport.null_space`.
        batches: so many batches of ``train_mb_size`` examples of each experience, drawn at random
            the same way each time, make its space; None takes all.
        every: optimizer steps between two projections, as in `NullSpace.attach`.
        include: patterns of the layers that may move from the second experience on; all by default.
        exclude: patterns of layers that must not.

    Attributes:
        space: what is kept so far; None before the first experience has ended.

    Raises:
        ValueError: if ``batches`` < 1; after the first experience for a bad ``tau`` or patterns
            that match no layer.

    Example:
        ``Naive(model=model, optimizer=optimizer, plugins=[NullSpacePlugin(tau=0.97)])``
    """

    def __init__(
        self,
        tau: Tau = 1.0,
        *,
        batches: int | None = 32,
        every: int = 1,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        whole = batches is None or (isinstance(batches, int) and batches >= 1)
        require("batches", batches, whole, "an integer >= 1, or None")
        require("every", every, isinstance(every, int) and every >= 1, "an integer >= 1")
        self.batches, self.every = batches, every
        self.space: NullSpace | None = None
        self._make = partial(null_space, tau=tau, include=include, exclude=exclude, progress=False)
        self._attachment: Attachment | None = None

    def before_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Attach what is kept to the optimizer, which knows the adapted model by now.

        Raises:
            NullSpaceError: if the model's layers are not those of earlier experiences any more.
        """
        self._detach()
        if self.space is not None:
            self.space = _with_new_layers(self.space, strategy.model)
            self._attachment = self.space.attach(
                strategy.optimizer, self.every, model=strategy.model
            )

    def after_training_exp(self, strategy: Any, *_: Any, **__: Any) -> None:
        """Keep this experience, too."""
        self._detach()
        with _as_found(strategy):
            strategy.model.eval()
            new = self._make(strategy.model, self._closures(strategy))
        kept = self.space
        self.space = new if kept is None else _with_new_layers(kept, strategy.model).merge(new)

    def _closures(self, strategy: Any) -> Iterator[Callable[[], Any]]:
        """Each runs the model on a batch of the experience, as the strategy does in training."""
        dataset = strategy.experience.dataset
        loader = DataLoader(
            dataset,
            batch_size=strategy.train_mb_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),  # training draws what it would draw
            collate_fn=getattr(dataset, "collate_fn", None),
        )
        for batch in islice(loader, self.batches):
            yield partial(_forward, strategy, [part.to(strategy.device) for part in batch])

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = None


def _forward(strategy: Any, batch: list[Any]) -> Any:
    strategy.mbatch = batch
    return strategy.forward()


def _with_new_layers(space: NullSpace, model: nn.Module) -> NullSpace:
    """The space with layers that the model has got since: no data reached them, they are free."""
    new = [b for b in cover(model).blocks if b.name not in space.bases | space.frozen]
    free = {block.name: block.basis(block.space(), 1.0) for block in new}
    return NullSpace({**space.bases, **free}, space.frozen, model)


@contextmanager
def _as_found(strategy: Any) -> Iterator[None]:
    """Afterwards the model's modes and the strategy's batch are as before."""
    modes = {module: module.training for module in strategy.model.modules()}
    batch = strategy.mbatch
    try:
        yield
    finally:
        strategy.mbatch = batch
        for module, training in modes.items():
            module.training = training
