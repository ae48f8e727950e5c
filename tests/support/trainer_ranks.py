"""What two processes do in the distributed test of the trainers' callbacks.

``python trainer_ranks.py FOLDER`` trains with Lightning and with transformers' ``Trainer``, each in
two processes; they write their weights, and the steps and growths of their teleports.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from teleport import Schedule
from tests.support.trainers import SIZE, batches, network, weights

SCHEDULE = Schedule(epochs=2, warmup_steps=2)


class Rows(Dataset):
    def __init__(self) -> None:
        self.pairs = [pair for x, y in batches() for pair in zip(x.double(), y, strict=True)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        x, y = self.pairs[index]
        return {"x": x, "labels": y}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = network().double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def with_lightning(folder: Path) -> Any:
    import lightning.pytorch as pl

    from teleport.integrations.lightning import TeleportCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch)["loss"]
            self.log("loss", loss, sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, callback = Module(), TeleportCallback(SCHEDULE, growth=1.5)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        callbacks=[callback], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,  # it shuffles
    )  # fmt: skip
    rows = Rows()
    mine = DistributedSampler(rows, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(rows, batch_size=SIZE // 2, sampler=mine))
    return module.model, callback


def with_transformers(folder: Path) -> Any:
    import transformers
    from torch.utils.data import SequentialSampler

    from teleport.integrations.transformers import TeleportCallback

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    settings = transformers.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=SIZE // 2, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", ddp_backend="gloo",
    )  # fmt: skip
    trainer = Trainer(Model(), settings, train_dataset=Rows())
    callback = TeleportCallback(SCHEDULE, trainer=trainer, growth=1.5)
    trainer.add_callback(callback)
    trainer.train()
    return trainer.model, callback


TRAINERS = {"lightning": with_lightning, "transformers": with_transformers}


def rank(number: int, library: str, folder: str, port: int) -> None:
    """One of two processes."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model, callback = TRAINERS[library](Path(folder))
    found = {
        "weights": weights(model),
        "teleports": [(step, report.growth) for step, report in callback.reports],
        "ranks": torch.distributed.get_world_size(),
    }
    torch.save(found, Path(folder) / f"{library}{number}.pt")


def main(folder: str) -> None:
    """Load the libraries once, and then make two of this process for each."""
    import accelerate  # noqa: F401

    for library in TRAINERS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = library, folder, port
        multiprocessing.start_processes(rank, arguments, nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
