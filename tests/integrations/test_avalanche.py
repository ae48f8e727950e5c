"""The plugin for Avalanche: with Avalanche where it is, and through its plugin interface alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from tests.support import avalanche_stand_in as stand_in
from tests.support.trainers import Batch, same, weights

FEATURES, ROWS, CLASSES, TASKS = 40, 12, 3, 3
pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's dependencies


def tasks() -> list[Batch]:
    draw = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(ROWS, FEATURES, generator=draw),
            torch.randint(CLASSES, (ROWS,), generator=draw),
        )
        for _ in range(TASKS)
    ]


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Dropout(0.1))


class StandIn:
    """What a test needs of Avalanche, by the classes that stand in for it."""

    def plugin(self, **arguments: Any) -> Any:
        from teleport.integrations.avalanche import NullSpacePlugin

        return NullSpacePlugin(**arguments)

    def model(self) -> nn.Module:
        return stand_in.MultiHead(body(), 64, CLASSES)

    def strategy(self, model: Any, plugins: Sequence[Any], epochs: int) -> Any:
        return stand_in.Naive(
            model=model,
            optimizer=Adam(model.parameters(), lr=0.01),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            train_epochs=epochs,
            plugins=plugins,
        )

    def experiences(self) -> list[Any]:
        return stand_in.experiences(tasks())


class Real(StandIn):
    """The same by Avalanche itself."""

    def model(self) -> nn.Module:
        from avalanche.models import MultiHeadClassifier, MultiTaskModule

        class Net(MultiTaskModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.body = body()
                self.heads = MultiHeadClassifier(64, CLASSES)

            def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
                found: Tensor = self.heads(self.body(x), task_labels)
                return found

        return Net()

    def strategy(self, model: Any, plugins: Sequence[Any], epochs: int) -> Any:
        from avalanche.training import Naive
        from avalanche.training.plugins import EvaluationPlugin

        return Naive(
            model=model,
            optimizer=Adam(model.parameters(), lr=0.01),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            train_epochs=epochs,
            plugins=list(plugins),
            evaluator=EvaluationPlugin(),
        )

    def experiences(self) -> list[Any]:
        from avalanche.benchmarks.scenarios import benchmark_from_datasets
        from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
        from avalanche.benchmarks.scenarios.task_aware import task_incremental_benchmark
        from avalanche.benchmarks.utils import as_classification_dataset
        from torch.utils.data import TensorDataset

        found = []
        for x, y in tasks():
            data = TensorDataset(x, y)
            data.targets = y.tolist()  # type: ignore[attr-defined]
            found.append(as_classification_dataset(data))
        benchmark = task_incremental_benchmark(benchmark_from_datasets(train=found))
        stream = list(with_classes_timeline(benchmark).train_stream)
        for experience in stream:  # a set, with which 0.6.0 cannot index
            experience.classes_in_this_experience = list(range(CLASSES))
        return stream


@pytest.fixture(params=["stand-in", "real"])
def avalanche(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    if request.param == "real":
        pytest.importorskip("avalanche", reason="pip install '.[avalanche]' brings it")
        yield Real()
        return
    with stand_in.installed():
        yield StandIn()


def outputs(model: nn.Module, task: int) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(tasks()[task][0], torch.full((ROWS,), task))
    model.train()
    return found


def test_earlier_tasks_stay_and_later_ones_are_learned(avalanche: StandIn) -> None:
    plugin, model = avalanche.plugin(batches=None), avalanche.model()
    strategy = avalanche.strategy(model, [plugin], epochs=10)
    after: dict[int, Tensor] = {}
    for task, experience in enumerate(avalanche.experiences()):
        strategy.train([experience])
        after[task] = outputs(model, task)
        assert cross_entropy(after[task], tasks()[task][1]) < 0.25, "each task is learned"
        ranks = {name: basis.rank for name, basis in plugin.space.bases.items()}
        assert ranks["body.0"] == (task + 1) * ROWS
    for task, before in after.items():
        torch.testing.assert_close(outputs(model, task), before, rtol=0, atol=2e-5)
    heads = [rank for name, rank in ranks.items() if "heads" in name]
    assert sum(heads) == TASKS * ROWS, "a head keeps its own task's inputs and no other's"


def test_without_the_plugin_the_first_task_is_forgotten(avalanche: StandIn) -> None:
    model = avalanche.model()
    strategy = avalanche.strategy(model, [], epochs=10)
    first, second, *_ = avalanche.experiences()
    strategy.train([first])
    before = outputs(model, 0)
    strategy.train([second])
    assert (outputs(model, 0) - before).abs().max() > 0.05


def test_the_first_experience_is_trained_as_without_the_plugin(avalanche: StandIn) -> None:
    """Nor does what is drawn later change: the space is made without random numbers."""
    found = []
    for plugins in ([], [avalanche.plugin()]):
        torch.manual_seed(5)
        model = avalanche.model()
        avalanche.strategy(model, plugins, epochs=2).train(avalanche.experiences()[:1])
        found.append((weights(model), torch.get_rng_state(), model.training))
    (plain, state, mode), (with_plugin, after, kept_mode) = found
    assert same(plain, with_plugin)
    assert torch.equal(state, after)
    assert (mode, kept_mode) == (True, True)


def test_a_number_of_batches_bounds_what_is_looked_at(avalanche: StandIn) -> None:
    plugin, model = avalanche.plugin(batches=2), avalanche.model()
    avalanche.strategy(model, [plugin], epochs=1).train(avalanche.experiences()[:1])
    assert plugin.space.bases["body.0"].rank == 2 * 4
    other = avalanche.plugin(include=["body*"])
    avalanche.strategy(avalanche.model(), [other], epochs=1).train(avalanche.experiences()[:1])
    assert list(other.space.bases) == ["body.0"]


def test_the_optimizer_is_free_between_experiences(avalanche: StandIn) -> None:
    plugin, model = avalanche.plugin(), avalanche.model()
    strategy = avalanche.strategy(model, [plugin], epochs=1)
    strategy.train(avalanche.experiences()[:2])
    assert not strategy.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batches": 0}, "batches must be an integer >= 1"), ({"every": 0}, "every must be")],
)
def test_wrong_arguments_are_told_at_once(
    avalanche: StandIn, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        avalanche.plugin(**arguments)
