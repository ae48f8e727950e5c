"""The Lightning callback, in the real ``Trainer``, against loops that are written by hand."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport import Schedule, TeleportReport, UnsupportedModelError
from tests.support.trainers import BATCHES, batches, by_hand, network, same, weights

lightning = pytest.importorskip("lightning.pytorch", reason="pip install '.[test]' brings it")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402
from lightning.pytorch.plugins.precision import DoublePrecision  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from teleport.integrations.lightning import TeleportCallback  # noqa: E402

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


class Classifier(lightning.LightningModule):
    """Logs, counts, measures and keeps all that people log, count, measure and keep."""

    def __init__(self, dropout: float = 0.0, optimizer: str = "SGD") -> None:
        super().__init__()
        self.net, self.optimizer = network(dropout), optimizer
        self.accuracy = MulticlassAccuracy(3)
        self.losses: list[Tensor] = []
        self.seen: dict[str, list[int]] = {"rows": []}
        self.count, self.sums = 0, torch.zeros(2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.mul_(1.0)  # a step may write to its batch
        x[:, 0] += 1.0
        logits = self.net(x)
        loss = cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"accuracy": self.accuracy}, on_step=False, on_epoch=True)
        if self.logger:
            self.logger.log_metrics({"own": 1.0}, step=batch_idx)
        self.losses.append(loss.detach())
        self.seen["rows"].append(len(x))
        self.count += 1
        self.sums += 1.0
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.1)


def loss_by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x = batch[0].clone()
    x[:, 0] += 1.0
    return cross_entropy(model(x), batch[1])


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name, version = "recorder", 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def fit(
    *callbacks: Any, model: Classifier | None = None, ckpt: Any = None, **options: Any
) -> tuple[Classifier, Any]:
    torch.manual_seed(1)
    model = Classifier() if model is None else model
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(**QUIET, callbacks=list(callbacks), **options)
    trainer.fit(model, Batches(), ckpt_path=ckpt)
    return model, trainer


class Batches:
    """The same batches in every epoch; where it was, it goes on."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        start, data = self.at % BATCHES, batches()
        for self.at in range(start + 1, BATCHES + 1):
            yield data[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_without_teleports_training_is_bit_for_bit_as_without_the_callback() -> None:
    plain, _ = fit(model=None, accumulate_grad_batches=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    off = TeleportCallback(Schedule(epochs=0), growth=1.5)
    assert torch.equal(state, torch.get_rng_state())
    found, _ = fit(off, accumulate_grad_batches=2)
    assert same(weights(plain), weights(found))
    assert off.reports == []


@pytest.mark.parametrize(
    ("accumulate", "precision", "schedule"),
    [
        (1, "32-true", Schedule(epochs=2, warmup_steps=3)),
        (2, "32-true", Schedule(epochs=2, warmup_steps=1)),
        (1, "bf16-mixed", Schedule(epochs=1, warmup_steps=2)),
        (1, "32-true", Schedule(epochs=1, warmup_steps=0, batches=2)),
    ],
)
def test_weights_are_those_of_a_loop_by_hand(
    accumulate: int, precision: Any, schedule: Schedule
) -> None:
    callback = TeleportCallback(schedule, growth=1.5)
    found, trainer = fit(callback, accumulate_grad_batches=accumulate, precision=precision)
    torch.manual_seed(1)
    model = Classifier().net
    steps = by_hand(
        model,
        loss_by_hand,
        schedule,
        accumulate,
        torch.bfloat16 if precision == "bf16-mixed" else None,
        growth=1.5,
    )
    assert [step for step, _ in callback.reports] == steps
    assert len(steps) == schedule.epochs * schedule.batches
    assert all(report.growth == pytest.approx(1.5, rel=0.02) for _, report in callback.reports)
    assert same(weights(found.net), weights(model))
    assert trainer.global_step == 2 * -(-BATCHES // accumulate)


def test_what_the_closures_log_keep_and_measure_does_not_count() -> None:
    """And the teleport stands in the logger, with its step."""
    plain, trained = fit(logger=(before := Recorder()), log_every_n_steps=1, max_epochs=1)
    callback = TeleportCallback(Schedule(warmup_steps=BATCHES), growth=1.5)
    found, trainer = fit(callback, logger=(after := Recorder()), log_every_n_steps=1, max_epochs=1)
    (report,) = [report for _, report in callback.reports]
    told = [row for row in after.rows if "teleport/growth" in row[1]]
    assert [row for row in after.rows if row not in told] == before.rows
    assert told == [
        (
            BATCHES,
            {
                "teleport/growth": report.growth,
                "teleport/grad_norm_before": report.grad_norm_before,
                "teleport/grad_norm_after": report.grad_norm_after,
                "teleport/drift": report.drift,
                "teleport/seconds": report.seconds,
            },
        )
    ]
    assert trainer.callback_metrics == trained.callback_metrics
    assert (found.count, found.seen, len(found.losses)) == (plain.count, plain.seen, BATCHES)
    assert found.sums.tolist() == plain.sums.tolist() == [BATCHES, BATCHES]
    assert report.growth == pytest.approx(1.5, rel=1e-3)
    assert not same(weights(found), weights(plain))
    assert "log" not in vars(found)


class Broken(Classifier):
    """Raises in the first call of every closure."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.count > batch_idx + self.current_epoch * BATCHES:
            raise KeyError("never\nseen")
        return super().training_step(batch, batch_idx)


class Uncopied(Classifier):
    """Its batches cannot be copied."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], batch[1]], (n for n in ())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx)


class Warming(Classifier):
    """Its loss depends on a counter, as one with a weight that grows, and on a value kept."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * min(1.0, self.count / 20) / (10.0 + self.sums.mean())


class Recurrent(Classifier):
    """Begins with the hidden state that it ended with."""

    hidden: Tensor | float = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.net[:2](batch[0]) + 0.5 * self.hidden
        self.hidden = hidden.detach()
        return cross_entropy(self.net[2:](hidden), batch[1])


@pytest.mark.parametrize("kind", [Warming, Recurrent])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_whose_loss_depends_on_what_it_keeps_teleports(
    kind: type[Classifier], accumulate: int
) -> None:
    callback = TeleportCallback(Schedule(warmup_steps=2), growth=1.5)
    model, _ = fit(callback, model=kind(), accumulate_grad_batches=accumulate)
    ((_, report),) = callback.reports
    assert report.growth == pytest.approx(1.5, rel=1e-3)
    assert report.drift < 1e-6
    assert model.count == (2 * BATCHES if kind is Warming else 0)


def test_a_training_that_ends_too_early_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "teleport"):
        fit(TeleportCallback(Schedule(epochs=9, warmup_steps=2), growth=1.5))
        fit(TeleportCallback(), max_steps=3)
    assert (
        "step 10, before the teleports due after steps 15, 20, 25, 30, 35 and 1 more: a Sche"
        in (caplog.text)
    )
    assert "after step 3, before the teleports due after step 50: a Schedule with" in caplog.text


def test_a_teleport_that_is_interrupted_is_done_when_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    callback, model = TeleportCallback(Schedule(warmup_steps=2), growth=1.5), Classifier()
    monkeypatch.setattr("teleport.teleporter.Teleporter.step", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(callback, model=model)
    assert callback.state_dict() == {"done": 0}
    assert model.count == 2
    assert "log" not in vars(model)


@pytest.mark.parametrize(
    ("kind", "arguments", "why"),
    [
        (Classifier, {"tau": 0.3, "max_drift": 1e-12}, "loss"),
        (Broken, {}, "KeyError: 'never"),
        (Uncopied, {}, "cannot be copied"),
    ],
)
def test_a_refused_teleport_is_a_line_and_training_goes_on(
    kind: type[Classifier],
    arguments: dict[str, Any],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(1)
    plain, _ = fit(model=kind())
    torch.manual_seed(1)
    callback = TeleportCallback(Schedule(warmup_steps=2), growth=1.5, **arguments)
    with caplog.at_level(logging.WARNING, "teleport"):
        found, _ = fit(callback, model=kind())
    assert same(weights(found), weights(plain))
    assert torch.equal(torch.stack(found.losses), torch.stack(plain.losses))
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("teleport")]
    assert line.startswith("no teleport after step 2: ")
    assert why in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"growth": 0.5}, ValueError, 'growth must be > 1 and finite, or "auto", got 0.5'),
        ({"include": "0"}, ValueError, "include must be a list of patterns, got '0'"),
        ({"objective": "other"}, ValueError, "objective must be one of"),
        ({"grow": 2.0}, TypeError, "grow"),
        ({"optimizer": None}, TypeError, "the optimizer is the trainer's"),
        ({"schedule": 1.5}, TypeError, "schedule"),
    ],
)
def test_wrong_arguments_are_told_when_the_callback_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TeleportCallback(**arguments)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBatches(Classifier):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (Classifier, {"include": ["nothing*"]}, ValueError, "nothing"),
        (Classifier, {"strict": True, "exclude": ["other"]}, ValueError, "other"),
        (Manual, {}, UnsupportedModelError, "automatic optimization"),
        (OwnBatches, {}, UnsupportedModelError, "dataloader_iter"),
    ],
)
def test_what_does_not_fit_is_told_before_the_first_step(
    model: Callable[[], Classifier],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        fit(TeleportCallback(growth=1.5, **arguments), model=(made := model()))
    assert made.count == 0


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    """From a checkpoint before, at and after each teleport, in the middle of an epoch."""
    schedule = Schedule(epochs=2, warmup_steps=2)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callback = TeleportCallback(schedule, growth=1.5)
    whole, _ = fit(callback, saving, enable_checkpointing=True)
    assert [step for step, _ in callback.reports] == [2, BATCHES]
    for step in (1, 2, 3, BATCHES - 1, BATCHES):
        again = TeleportCallback(schedule, growth=1.5)
        torch.manual_seed(7)
        found, _ = fit(again, model=Classifier(), ckpt=tmp_path / f"step={step}.ckpt")
        assert [at for at, _ in again.reports] == [at for at in (2, BATCHES) if at > step], step
        assert same(weights(found), weights(whole)), step


def test_what_was_missed_is_done_after_the_next_step_and_a_new_fit_begins_anew() -> None:
    callback = TeleportCallback(Schedule(epochs=1, warmup_steps=2), growth=1.5)
    model, _ = fit(callback, max_epochs=1)
    fit(callback, max_epochs=1)
    assert [step for step, _ in callback.reports] == [2, 2]
    assert callback.state_dict() == {"done": 1}
    callback.load_state_dict({"done": 0})
    callback._teleports.start(model, None, 5, BATCHES)  # a checkpoint after step 5, 0 done
    assert callback._teleports.wants(5)


def test_the_preconditioned_objective_takes_the_trainers_optimizer() -> None:
    callback = TeleportCallback(Schedule(warmup_steps=2), objective="preconditioned", growth=1.2)
    fit(callback, model=Classifier(optimizer="Adam"), max_epochs=1)
    (report,) = [report for _, report in callback.reports]
    assert "Adam" in report.norm
    assert report.growth == pytest.approx(1.2, rel=0.02)


def test_growth_auto_counts_the_trainers_steps_and_its_refusals_are_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = TeleportCallback(Schedule(epochs=2, warmup_steps=3), growth="auto")
    log = Recorder()
    fit(callback, logger=log)
    assert callback._teleports._deciding._decision.steps == 2 * BATCHES - 1
    assert [step for step, _ in callback.reports] == [3, 5]
    assert not any(report.steps for _, report in callback.reports)
    told = [line for line in caplog.messages if line.startswith("no teleport after step")]
    assert len(told) == 2
    assert all("no room in the budget" in line or "would not pay" in line for line in told)
    assert not any(value != value for _, row in log.rows for value in row.values())  # NaN


class Scaler:
    """Of a loss, as `torch.amp.GradScaler`."""

    def get_scale(self) -> float:
        return 1024.0


@pytest.mark.parametrize("arguments", [{"growth": 1.5}, {"lr": 0.05, "steps": 2, "cap": 3.0}])
def test_a_scaled_loss_teleports_as_the_loss_itself(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the report is of the loss itself."""
    found: list[tuple[dict[str, Tensor], TeleportReport]] = []
    for scaler in (None, Scaler()):
        monkeypatch.setattr(DoublePrecision, "scaler", scaler, raising=False)
        callback = TeleportCallback(Schedule(warmup_steps=1), **arguments)
        torch.manual_seed(1)
        model, _ = fit(callback, precision="64-true", max_epochs=1, max_steps=1)
        found.append((weights(model), callback.reports[0][1]))
    (plain, report), (scaled, again) = found
    assert report.growth > 1.01
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-6, atol=1e-9)
    for name in ("loss_before", "grad_norm_before", "grad_norm_after", "tolerance"):
        assert getattr(again, name) == pytest.approx(getattr(report, name), rel=1e-6)
    assert again.step_sizes == pytest.approx(report.step_sizes, rel=1e-6)
    assert again.layers[-1].grad_norm_after == pytest.approx(report.layers[-1].grad_norm_after)
