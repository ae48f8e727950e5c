"""When to teleport during training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Teleport before each of the first epochs, not before the warm-up is over.

    Args:
        epochs: number of epochs, counted from the first, that begin with a teleport.
        batches: teleport batches each time, one after the other.
        warmup_steps: training steps before the first teleport; an earlier one waits until then.

    Raises:
        ValueError: if a count is no integer or negative, or ``batches`` is 0.

    Example:
        >>> sorted(Schedule(epochs=3, batches=1, warmup_steps=50).due_steps(steps_per_epoch=100))
        [50, 100, 200]
    """

    epochs: int = 1
    batches: int = 1
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batches", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    def due_steps(self, steps_per_epoch: int) -> frozenset[int]:
        """Numbers of finished training steps at which a teleport is due."""
        starts = (epoch * steps_per_epoch for epoch in range(self.epochs))
        return frozenset(max(start, self.warmup_steps) for start in starts)
