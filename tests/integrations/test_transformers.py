"""The callback of Hugging Face's ``Trainer``, the real one, against loops written by hand."""

import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler

from teleport import Schedule
from tests.support.trainers import BATCHES, SIZE, batches, by_hand, network, same, weights

transformers = pytest.importorskip("transformers", reason="pip install '.[test]' brings it")
pytest.importorskip("accelerate", reason="pip install '.[test]' brings it")
from teleport.integrations.transformers import TeleportCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # their advice


def bert(dropout: float = 0.0) -> nn.Module:
    """A classifier of two tokens."""
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=4, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification(config)


class Averaging(nn.Module):
    """Its loss is the mean over its batch, which the Trainer divides by the micro-batches."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = network(dropout)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


class Summing(Averaging):
    """Its loss is the sum over its batch, divided by what the step has, as language models'."""

    def forward(  # type: ignore[override]
        self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        total = nn.functional.cross_entropy(self.net(x), labels, reduction="sum")
        return {"loss": total / (len(x) if num_items_in_batch is None else num_items_in_batch)}


def tokens(x: Tensor) -> Tensor:
    """Two tokens of each example."""
    return (x[:, :2].abs() * 5).long().clamp(max=11)


def examples() -> list[dict[str, Tensor]]:
    return [
        {"input_ids": ids, "labels": label}
        for x, y in batches()
        for ids, label in zip(tokens(x), y, strict=True)
    ]


def loss_by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = model(input_ids=tokens(batch[0]), labels=batch[1]).loss
    return loss


def rows() -> list[dict[str, Tensor]]:
    pairs = [pair for x, y in batches() for pair in zip(x, y, strict=True)]
    return [{"x": x, "labels": label} for x, label in pairs]


def mean_by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = model(*batch)["loss"]
    return loss


class Trainer(transformers.Trainer):
    """The same batches in every epoch."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def trainer_in(
    folder: Path, model: nn.Module | None = None, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    data = options.pop("data", None) or examples()
    options = {
        "num_train_epochs": 2, "per_device_train_batch_size": SIZE, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
        "dataloader_pin_memory": False, "seed": 3, **options,
    }  # fmt: skip
    settings = transformers.TrainingArguments(str(folder), **options)
    trainer = kind(model or bert(), settings, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(folder: Path, schedule: Schedule | None = None, **options: Any) -> tuple[Any, Any]:
    """A trainer that has trained, and the callback it had."""
    arguments = options.pop("arguments", {"growth": 1.5})
    resume = options.pop("resume", None)
    trainer, callback = trainer_in(folder, **options), None
    if schedule is not None:
        callback = TeleportCallback(schedule, trainer=trainer, **arguments)
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_without_teleports_training_is_bit_for_bit_as_without_the_callback(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 1}
    plain, _ = train(tmp_path, model=bert(0.1), **options)
    found, callback = train(tmp_path, Schedule(epochs=0), model=bert(0.1), **options)
    assert same(weights(plain.model), weights(found.model))
    assert callback.reports == []


@pytest.mark.parametrize(
    ("make", "accumulate", "half", "schedule"),
    [
        (bert, 1, False, Schedule(epochs=2, warmup_steps=3)),
        (bert, 1, True, Schedule(epochs=1, warmup_steps=2)),
        (Averaging, 2, False, Schedule(epochs=2, warmup_steps=1)),
        (Summing, 2, False, Schedule(epochs=1, warmup_steps=0, batches=2)),
    ],
)
def test_weights_are_those_of_a_loop_by_hand(
    make: Callable[[], nn.Module], accumulate: int, half: bool, schedule: Schedule, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulate, "bf16": half}
    loss = loss_by_hand if make is bert else mean_by_hand
    data = examples() if make is bert else rows()
    found, callback = train(tmp_path, schedule, model=make(), data=data, **options)
    model = make()
    steps = by_hand(
        model,
        loss,
        schedule,
        accumulate,
        torch.bfloat16 if half else None,
        mean_of_last=True,
        growth=1.5,
    )
    assert [step for step, _ in callback.reports] == steps
    assert len(steps) == schedule.epochs * schedule.batches
    assert all(report.growth == pytest.approx(1.5, rel=0.02) for _, report in callback.reports)
    assert all(0.8 < report.loss_before < 1.6 for _, report in callback.reports)
    assert same(weights(found.model), weights(model))
    assert "compute_loss" not in vars(found)


class OwnLoss(Trainer):
    """Smooths labels its own way, logs in its loss, and keeps what trainers of this kind keep."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self.calls = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        labels = inputs.pop("labels")  # as the Trainer does with a label smoother
        logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        self._metrics["train"]["loss"].append(loss.item())
        self.calls += 1
        self.log({"own": loss.item()})
        return (loss, logits) if return_outputs else loss


def test_what_the_closures_log_and_keep_does_not_count(tmp_path: Path) -> None:
    """And the teleport stands in the log, with its step; the loss of that step, too."""
    options = {"kind": OwnLoss, "num_train_epochs": 1, "logging_strategy": "steps"}
    options["logging_steps"] = 1
    plain, _ = train(tmp_path, **options)
    found, callback = train(tmp_path, Schedule(warmup_steps=BATCHES), **options)
    ((step, report),) = callback.reports
    assert report.growth == pytest.approx(1.5, rel=1e-3)
    (told,) = [row for row in found.state.log_history if "teleport/growth" in row]
    assert told == {
        "teleport/growth": report.growth,
        "teleport/grad_norm_before": report.grad_norm_before,
        "teleport/grad_norm_after": report.grad_norm_after,
        "teleport/drift": report.drift,
        "teleport/seconds": report.seconds,
        "epoch": 1.0,
        "step": BATCHES,
    }
    assert step == BATCHES
    keys = [
        [sorted(row) for row in run.state.log_history if row is not told] for run in (plain, found)
    ]
    assert keys[0] == keys[1]
    losses = [[r["loss"] for r in run.state.log_history if "loss" in r] for run in (plain, found)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == BATCHES
    assert found._metrics == plain._metrics
    assert found.calls == plain.calls == BATCHES
    assert not {"log", "compute_loss"} & set(vars(found))


class NoLoss(Trainer):
    """Its training step has a loss of its own."""

    def training_step(self, model: Any, inputs: Any, *_: Any) -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


class Refusing(Trainer):
    """A second call after as many steps fails."""

    steps: ClassVar[list[int]] = []  # an attribute of the trainer would be put back

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        self.steps.append(self.state.global_step)
        if self.steps.count(self.state.global_step) == 2:
            raise ValueError("used\nup")
        return super().compute_loss(model, inputs, *args, **options)


@pytest.mark.parametrize(
    ("kind", "arguments", "why"),
    [
        (Trainer, {"tau": 0.3, "max_drift": 1e-12}, "loss"),
        (Refusing, {}, "ValueError: used up"),
        (NoLoss, {}, "no batch was seen"),
    ],
)
def test_a_refused_teleport_is_a_line_and_training_goes_on(
    kind: type[Trainer],
    arguments: dict[str, Any],
    why: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Refusing.steps.clear()
    plain, _ = train(tmp_path, num_train_epochs=1)
    with caplog.at_level(logging.WARNING, "teleport"):
        found, _ = train(
            tmp_path,
            Schedule(warmup_steps=2),
            kind=kind,
            arguments={"growth": 1.5, **arguments},
            num_train_epochs=1,
        )
    assert same(weights(found.model), weights(plain.model))
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("teleport")]
    assert line.startswith("no teleport after step 2: ")
    assert why in line


def test_wrong_arguments_are_told_when_the_callback_is_made(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match=r'growth must be > 1 and finite, or "auto", got 0\.5'):
        TeleportCallback(trainer=trainer, growth=0.5)
    with pytest.raises(TypeError, match="trainer"):
        TeleportCallback(Schedule(), growth=1.5)
    with pytest.raises(TypeError, match=r"transformers\.Trainer, got NoneType"):
        TeleportCallback(Schedule(), trainer=None, growth=1.5)
    trainer.add_callback(TeleportCallback(trainer=trainer, include=["nothing*"]))
    with pytest.raises(ValueError, match="nothing"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_two_callbacks_of_one_trainer_do_what_each_would_alone(tmp_path: Path) -> None:
    def trained(*schedules: Schedule) -> tuple[Any, list[int]]:
        trainer = trainer_in(tmp_path)
        callbacks = [TeleportCallback(s, trainer=trainer, growth=1.5) for s in schedules]
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        assert "compute_loss" not in vars(trainer)
        return trainer, [step for callback in callbacks for step, _ in callback.reports]

    early, late = Schedule(warmup_steps=2), Schedule(warmup_steps=5, batches=2)
    both, steps = trained(early, late)
    again, _ = trained(late, early)
    assert steps == [2, 5, 5]
    assert same(weights(both.model), weights(again.model))
    assert trained(Schedule(warmup_steps=2), Schedule(warmup_steps=2))[1] == [2, 2]


class Stopped(Trainer):
    """By Ctrl-C, in the step before a teleport."""

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return loss


def test_after_ctrl_c_evaluating_keeps_no_batches(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, kind=Stopped)
    callback = TeleportCallback(Schedule(warmup_steps=2), trainer=trainer, growth=1.5)
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate(examples())
    assert len(callback._teleports._parts) == 1


def test_the_callback_of_another_trainer_is_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.add_callback(TeleportCallback(trainer=trainer_in(tmp_path), growth=1.5))
    with pytest.raises(ValueError, match="made for another trainer"):
        trainer.train()


def test_a_training_that_ends_too_early_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "teleport"):
        train(tmp_path, Schedule(), max_steps=1)
    assert "training ended after step 1, before the teleports due after step 50" in caplog.text


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from examples()


def test_data_without_a_length_have_one_epoch(tmp_path: Path) -> None:
    options = {"data": Endless(), "max_steps": 3}
    _, callback = train(tmp_path, Schedule(warmup_steps=2), **options)
    assert [step for step, _ in callback.reports] == [2]
    with pytest.raises(ValueError, match="have no length"):
        train(tmp_path, Schedule(epochs=2), **options)


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    """From a checkpoint before, at and after each teleport, in the middle of an epoch."""
    schedule, model = Schedule(epochs=2, warmup_steps=2), partial(Averaging, 0.1)
    whole, callback = train(
        tmp_path / "whole",
        schedule,
        model=model(),
        data=rows(),
        save_strategy="steps",
        save_steps=1,
    )
    assert [step for step, _ in callback.reports] == [2, BATCHES]
    for step in (1, 2, BATCHES):
        found, again = train(
            tmp_path,
            schedule,
            model=model(),
            data=rows(),
            resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
        )
        assert [at for at, _ in again.reports] == [at for at in (2, BATCHES) if at > step], step
        assert same(weights(found.model), weights(whole.model)), step


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("lightning", "lightning.pytorch", "lightning"),
        ("transformers", "transformers", "transformers"),
        ("avalanche", "avalanche.core", "avalanche"),
    ],
)
def test_a_missing_library_is_told_with_its_extra(
    module: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"teleport.integrations.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"pip install 'nullspace-teleport\[{extra}\]'"):
        __import__(name)
