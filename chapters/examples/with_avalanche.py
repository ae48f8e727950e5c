"""Learn digits upright, then upside down, with Avalanche, and keep what was learned first."""

import torch
from avalanche.benchmarks.scenarios import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training import Naive
from torch.utils.data import TensorDataset

import teleport
from teleport.integrations.avalanche import NullSpacePlugin

digits = teleport.data.load("mnist-sample")


def experience(inputs, targets):
    data = TensorDataset(inputs, targets)
    data.targets = targets.tolist()
    return as_classification_dataset(data)


views = {"upright": lambda x: x, "flipped": lambda x: x.flip(1)}
train = [experience(view(digits.train_inputs), digits.train_targets) for view in views.values()]
for plugins in ([], [NullSpacePlugin(tau=0.97, batches=60)]):
    torch.manual_seed(0)
    model = teleport.models.mlp(784, 10, hidden=(256, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(
        model=model, optimizer=optimizer, train_mb_size=32, plugins=plugins, evaluator=None
    )
    strategy.train(benchmark_from_datasets(train=train).train_stream)
    model.eval()
    print("with the null space" if plugins else "without")
    for name, view in views.items():
        found = model(view(digits.test_inputs)).argmax(1)
        print(name, (found == digits.test_targets).float().mean().item())
