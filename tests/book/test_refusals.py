"""What the book's page of refusals says, case by case, for `Teleporter` and `null_space`."""

import math
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teleport import NullSpace, Teleporter, TeleportError, TeleportReport, null_space
from teleport.book.refusals import Situation, read_refusals
from tests.support.fingerprint import fingerprint

TOP = Path(__file__).parents[2]
TABLE = read_refusals(TOP / "chapters" / "refusals.toml")
CASES = {f"{kind.title}: {case.what}": case for kind in TABLE.kinds for case in kind.cases}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class World(dict[str, Any]):
    """The names of a case after its code has run; all numbers in double precision."""

    def __init__(self, case: Situation) -> None:
        super().__init__()
        self.case = case
        exec(TABLE.setup, self)
        exec(case.code, self)

    def later(self) -> None:
        exec(self.case.later, self)

    def around(self) -> AbstractContextManager[Any]:
        return eval(self.case.inside, self) if self.case.inside else nullcontext()

    def loss_and_norm(self) -> tuple[float, float]:
        """By plain autograd, with dropout off and the same random numbers at every call."""
        modes = [(module, module.training) for module in self["model"].modules()]
        self["model"].eval()
        torch.manual_seed(1)
        parameters = [p for p in self["model"].parameters() if p.requires_grad]
        value = self["loss"]()
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        for module, training in modes:
            module.training = training
        norm = math.sqrt(
            sum(float(g.detach().abs().square().sum()) for g in grads if g is not None)
        )
        return float(value.detach()), norm

    def outputs(self, x: Tensor) -> Tensor:
        """Of the model in evaluation mode."""
        self["model"].eval()
        result: Tensor = self["output"](x).detach().clone()
        self["model"].train()
        return result


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    torch._dynamo.reset()


def come_to(run: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """What a case comes to, and what is said."""
    try:
        return run()
    except TeleportError as error:
        return "refused", str(error)


@every
def test_a_step_does_what_the_page_says(case: Situation) -> None:
    def run() -> tuple[str, str]:
        report = step(world, Teleporter(world["model"], growth=1.2))
        return "moves" if report.steps else "stays", str(report)

    world = World(case)
    outcome, said = come_to(run)
    assert outcome == case.step, said
    assert case.says_of("step") in said


def step(world: World, teleporter: Teleporter) -> TeleportReport:
    """One step; the loss and its gradient before and after are those of plain autograd."""
    world.later()
    model = world["model"]
    if world.case.step == "refused":
        before = fingerprint(model)
        torch.manual_seed(1)
        with world.around():
            try:
                return teleporter.step(world["loss"])
            finally:
                assert {**fingerprint(model), "random": 0} == {**before, "random": 0}
    loss, norm = world.loss_and_norm()
    torch.manual_seed(1)
    buffers = [name for name, _ in model.named_buffers()]
    with world.around():
        report = teleporter.step(world["loss"])
    after, grown = world.loss_and_norm()
    assert not report.rolled_back, report.reason
    assert math.isclose(after, loss, rel_tol=1e-9)
    assert math.isclose(report.loss_before, loss, rel_tol=1e-9)
    assert math.isclose(report.grad_norm_before, norm, rel_tol=1e-6)
    assert math.isclose(grown, norm * (1.2 if report.steps else 1.0), rel_tol=1e-6)
    assert [name for name, _ in model.named_buffers()] == buffers
    return report


@every
def test_a_null_space_does_what_the_page_says(case: Situation) -> None:
    def run() -> tuple[str, str]:
        old = world["x"][:4].clone()
        with world.around():
            space = null_space(world["model"], [lambda: world["output"](old)])
        learn(world, space, old)
        return "kept", str(space)

    world = World(case)
    outcome, said = come_to(run)
    assert outcome == case.keep, said
    assert case.says_of("keep") in said


def learn(world: World, space: NullSpace, old: Tensor) -> None:
    """Five steps on new data with projected gradients: the old outputs stay, others change."""
    world.later()
    model, new = world["model"], fresh(world["x"])
    before, elsewhere = world.outputs(old), world.outputs(new)
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        world["output"](new).square().mean().backward()
        space.project_(model)
        optimizer.step()
    assert float((world.outputs(old) - before).abs().max()) <= 1e-9
    assert float((world.outputs(new) - elsewhere).abs().max()) >= 1e-6


def fresh(x: Tensor) -> Tensor:
    """Data of the same kind that the space has not seen."""
    return torch.randn_like(x) if x.is_floating_point() or x.is_complex() else (x + 25) % 50


FAULTS = sorted((TOP.parent / "shared" / "faults").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FAULTS, ids=[path.stem for path in FAULTS])
def test_the_collected_faults_are_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that lie beside the repository where it is developed; each exits with 0."""
    monkeypatch.setattr(sys, "argv", [str(path)])
    code: object = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert not code
