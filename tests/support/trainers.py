"""What the tests of trainers share: data, a network, and training loops written by hand."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from teleport import Schedule, Teleporter

SIZE, BATCHES = 8, 5
"""Examples of a batch, batches of an epoch."""

Batch = tuple[Tensor, Tensor]


def batches() -> list[Batch]:
    """One epoch."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE * BATCHES, 6, generator=draw)
    y = torch.randint(3, (SIZE * BATCHES,), generator=draw)
    return list(zip(x.split(SIZE), y.split(SIZE), strict=True))


def network(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Dropout(dropout),
        nn.Linear(32, 3),
    )  # fmt: skip


def by_hand(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    schedule: Schedule,
    accumulate: int,
    half: torch.dtype | None = None,
    epochs: int = 2,
    mean_of_last: bool = False,
    **arguments: Any,
) -> list[int]:
    """Train with SGD at 0.1, and teleport as the integrations say they do.

    Args:
        model: is trained.
        loss: of a batch.
        schedule: of the teleports.
        accumulate: micro-batches of a step.
        half: dtype of autocast, if any.
        epochs: of training.
        mean_of_last: whether the loss of a last step with fewer micro-batches is divided by these.
        arguments: of the teleporter.

    Returns:
        After which steps.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    teleporter = Teleporter(model, **arguments)
    per_epoch = -(-BATCHES // accumulate)
    due = {max(step, schedule.batches) for step in schedule.due_steps(per_epoch)}
    done: list[int] = []
    windows: list[tuple[Batch, ...]] = []

    def value(batch: Batch) -> Tensor:
        with torch.autocast("cpu", half) if half else nullcontext():
            return loss(model, batch)

    for _ in range(epochs):
        data = batches()
        for first in range(0, BATCHES, accumulate):
            window = tuple(data[first : first + accumulate])
            optimizer.zero_grad()
            for batch in window:
                (value(batch) / (len(window) if mean_of_last else accumulate)).backward()
            optimizer.step()
            windows.append(window)
            if len(windows) in due:
                for last in windows[-schedule.batches :]:
                    teleporter.step([lambda batch=batch: value(batch) for batch in last])  # type: ignore[misc]
                    done.append(len(windows))
    return done


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether they are bit for bit the same."""
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)
