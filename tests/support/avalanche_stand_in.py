"""Avalanche's plugin interface, for where Avalanche cannot be installed.

After the source of avalanche-lib 0.6.0: ``core.SupervisedPlugin`` and
``training.templates``: `base` (train), `base_sgd` (``_before_training_exp``, ``_train_exp``),
``observation_type.batch_observation`` (the model is adapted, then the optimizer is told),
``update_type.sgd_update`` (one epoch) and ``problem_type.supervised_problem`` (mini-batches). What
is here has the names, the attributes and the order of calls from there, and nothing more.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.support.trainers import Batch


class SupervisedPlugin:
    """A plugin that does nothing; a strategy calls those of these methods that there are."""

    def __init__(self) -> None:
        super().__init__()

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> Any: ...

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> Any: ...

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> Any: ...

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> Any: ...

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> Any: ...

    def after_training(self, strategy: Any, *args: Any, **kwargs: Any) -> Any: ...


@contextmanager
def installed() -> Iterator[None]:
    """``avalanche.core`` can be imported for a while, and what imported it is forgotten after."""
    before = {name: sys.modules.get(name) for name in ("avalanche", "avalanche.core")}
    core = ModuleType("avalanche.core")
    core.SupervisedPlugin = SupervisedPlugin  # type: ignore[attr-defined]
    sys.modules |= {"avalanche": ModuleType("avalanche"), "avalanche.core": core}
    sys.modules.pop("teleport.integrations.avalanche", None)
    try:
        yield
    finally:
        sys.modules.pop("teleport.integrations.avalanche", None)
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


class TaskDataset(Dataset):
    """Examples with the label of their task, as ``TaskAwareClassificationDataset``."""

    def __init__(self, x: Tensor, y: Tensor, task: int) -> None:
        self.x, self.y, self.task = x, y, task

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], self.task

    def collate_fn(self, examples: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, ...]:
        x, y, tasks = zip(*examples, strict=True)
        return torch.stack(x), torch.stack(y), torch.tensor(tasks)


@dataclass
class Experience:
    dataset: TaskDataset
    task_labels: list[int]


class MultiHead(nn.Module):
    """A body and a head for each task, which comes with the task (``MultiHeadClassifier``)."""

    def __init__(self, body: nn.Module, d_in: int, classes: int) -> None:
        super().__init__()
        self.body, self.d_in, self.classes = body, d_in, classes
        self.heads = nn.ModuleDict({"0": nn.Linear(d_in, classes)})

    def adaptation(self, experience: Experience) -> None:
        for task in experience.task_labels:
            if str(task) not in self.heads:
                self.heads[str(task)] = nn.Linear(self.d_in, self.classes)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        out = self.body(x)
        result = out.new_zeros(len(x), self.classes)
        for task in task_labels.unique():
            mask = task_labels == task
            result[mask] = self.heads[str(int(task))](out[mask])
        return result


class Naive:
    """Fine-tuning, one experience after the other."""

    def __init__(
        self,
        *,
        model: MultiHead,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        train_mb_size: int,
        train_epochs: int,
        plugins: Sequence[SupervisedPlugin],
    ) -> None:
        self.model, self.optimizer, self._criterion = model, optimizer, criterion
        self.train_mb_size, self.train_epochs = train_mb_size, train_epochs
        self.plugins, self.device = list(plugins), torch.device("cpu")
        self.experience: Experience | None = None
        self.mbatch: list[Tensor] | None = None
        self.mb_output: Tensor | None = None

    @property
    def mb_x(self) -> Tensor:
        return self.mbatch[0]  # type: ignore[index]

    @property
    def mb_y(self) -> Tensor:
        return self.mbatch[1]  # type: ignore[index]

    @property
    def mb_task_id(self) -> Tensor:
        return self.mbatch[-1]  # type: ignore[index]

    def forward(self) -> Tensor:
        return self.model(self.mb_x, self.mb_task_id)

    def train(self, experiences: Iterable[Experience]) -> None:
        self.model.train()
        self._trigger("before_training")
        for self.experience in experiences:
            self._before_training_exp()
            for _ in range(self.train_epochs):
                self.training_epoch()
            self._trigger("after_training_exp")
        self._trigger("after_training")
        self.experience = self.mbatch = self.mb_output = None

    def _before_training_exp(self) -> None:
        assert self.experience is not None
        dataset = self.experience.dataset
        self.dataloader = DataLoader(
            dataset, batch_size=self.train_mb_size, shuffle=True, collate_fn=dataset.collate_fn
        )
        self.model.adaptation(self.experience)
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        if new := [p for p in self.model.parameters() if p not in held]:
            self.optimizer.add_param_group({"params": new})
        self._trigger("before_training_exp")

    def training_epoch(self) -> None:
        for mbatch in self.dataloader:
            self.mbatch = [part.to(self.device) for part in mbatch]
            self.optimizer.zero_grad()
            self.mb_output = self.forward()
            self.loss = self._criterion(self.mb_output, self.mb_y)
            self.loss.backward()
            self._trigger("before_update")
            self.optimizer.step()
            self._trigger("after_update")

    def _trigger(self, event: str) -> None:
        for plugin in self.plugins:
            if hasattr(plugin, event):
                getattr(plugin, event)(self)


def experiences(tasks: Sequence[Batch]) -> list[Experience]:
    return [Experience(TaskDataset(x, y, t), [t]) for t, (x, y) in enumerate(tasks)]
