"""Train a perceptron with Lightning, and teleport it once, after 50 steps."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import teleport
from teleport.integrations.lightning import TeleportCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = teleport.models.mlp(784, 10, hidden=(256, 256))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.net(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


digits = teleport.data.load("mnist-sample")
data = TensorDataset(digits.train_inputs[:6400], digits.train_targets[:6400])
callback = TeleportCallback(teleport.Schedule(epochs=1, warmup_steps=50), growth=1.5)
trainer = pl.Trainer(
    max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False
)
trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
for step, report in callback.reports:
    print(f"after step {step}: {report}")
