"""How much of an update lies in the space that was to be kept, by optimizer.

Projecting a gradient keeps a space for an optimizer that adds gradients. One that rescales them
entry by entry, as Adam does, takes its steps out of the null space again; so does weight decay.
Projecting the displacement after the step keeps it for all (``thm-keep``).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from teleport.keeping.null_space import NullSpace, null_space
from teleport.lab.experiments.entry import one_of
from teleport.lab.experiments.optimizers import find_optimizer
from teleport.lab.keeping.comparison import table_of
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import read_rows
from teleport.lab.records.study import record_paths
from teleport.lab.records.writer import environment
from teleport.subspace import Basis

LEAK_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "lion": 1e-4}
"""Optimizers and their learning rates."""

PROJECTIONS = ("attach", "project_", "OSF")
LEAK_TITLE = "share of the update inside the kept space, of a small transformer"
TAU = 0.99
SHARE = 0.5


@dataclass(frozen=True)
class LeakSize:
    """The size: of the transformer (width, layers), its batches (sentences of tokens), steps."""

    width: int
    layers: int
    sentences: int
    tokens: int
    steps: int


LEAK_SIZES = {
    "tiny": LeakSize(width=16, layers=1, sentences=4, tokens=4, steps=5),
    "cpu": LeakSize(width=64, layers=2, sentences=16, tokens=8, steps=100),
}


class Encoder(nn.Module):
    """A transformer of linear layers that PEFT can see: attention of one head, feed-forward, norms.

    It maps ``[sentences, tokens, width]`` to the same shape.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks."""
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        scores = self.query(y) @ self.key(y).mT / sqrt(y.shape[-1])
        x = x + self.out(scores.softmax(-1) @ self.value(y))
        out: Tensor = x + self.down(torch.relu(self.up(self.second(x))))
        return out


class _Trial:
    """A model, old data, and something new to learn; float64."""

    def __init__(self, size: LeakSize, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Encoder(size.width, size.layers).double()
        shape = (size.sentences, size.tokens, size.width)
        # Old inputs have a spectrum that falls, as inputs have, so that there is something to keep.
        falling = torch.arange(1, size.width + 1, dtype=torch.float64).pow(-1.0)
        mixed = torch.linalg.qr(torch.randn(size.width, size.width, dtype=torch.float64)).Q
        self.old = (torch.randn(shape, dtype=torch.float64) * falling) @ mixed
        self.new, self.wanted = torch.randn(2, *shape, dtype=torch.float64)
        self.steps = size.steps

    def space(self) -> NullSpace:
        return null_space(self.model, [lambda: self.model(self.old)], TAU, progress=False)

    def train(
        self, model: nn.Module, name: str, before_step: Callable[[], None] = lambda: None
    ) -> Any:
        """Steps on the new data; first what is to be done with the optimizer is yielded."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = find_optimizer(name)(trained, LEAK_RATES[name])
        yield optimizer
        for _ in range(self.steps):
            optimizer.zero_grad()
            (model(self.new) - self.wanted).square().mean().backward()
            before_step()
            optimizer.step()

    def drift(self, model: nn.Module) -> float:
        with torch.no_grad():
            was, now = self.model(self.old), model(self.old)
        return float((now - was).norm() / was.norm())


def leak(way: str, optimizer: str, size: LeakSize, seed: int) -> dict[str, float]:
    """Train in one way with one optimizer of `LEAK_RATES`, and measure.

    The ways are those of `PROJECTIONS`: the displacement projected by `NullSpace.attach`, only the
    gradients by `NullSpace.project_`, or PEFT's OSF, which projects gradients, too. ValueError for
    another way or optimizer.

    Returns:
        ``moved``: Frobenius norm of the change of all linear layers' weights; ``inside``: norm of
        its part inside the kept space, as a share of it; ``drift``: norm of the change of the
        outputs on old data, as a share of theirs.
    """
    one_of("way", way, dict.fromkeys(PROJECTIONS))
    one_of("optimizer", optimizer, LEAK_RATES)
    trial = _Trial(size, seed)
    return _osf(trial, optimizer) if way == "OSF" else _ours(trial, optimizer, way)


def _ours(trial: _Trial, optimizer: str, way: str) -> dict[str, float]:
    model, space = copy.deepcopy(trial.model), trial.space()
    projected = way == "project_"
    course = trial.train(model, optimizer, lambda: space.project_(model) if projected else None)
    made = next(course)
    if not projected:
        space.attach(made, model=model)
    for _ in course:
        pass
    before = dict(trial.model.named_modules())
    moved, inside = [], []
    for name, layer in model.named_modules():
        basis = space.bases.get(name)
        if isinstance(layer, nn.Linear) and isinstance(basis, Basis):
            change = _affine(layer) - _affine(before[name])
            moved.append(change)
            inside.append((change @ basis.vectors) @ basis.vectors.mT)
    return _leak(moved, inside, trial.drift(model))


def _osf(trial: _Trial, optimizer: str) -> dict[str, float]:
    from peft import OSFConfig, get_peft_model

    layers = ["query", "key", "value", "out", "up", "down"]
    config = OSFConfig(target_modules=layers, effective_rank=SHARE)
    model = get_peft_model(copy.deepcopy(trial.model), config)
    for _ in trial.train(model, optimizer):
        pass
    moved, inside = [], []
    layer: Any
    for layer in model.modules():
        if not hasattr(layer, "osf_svd_params"):
            continue
        change = layer.get_delta_weight("default").detach().double()
        left, _, right = torch.linalg.svd(
            layer.get_base_layer().weight.detach(), full_matrices=False
        )
        rank = layer.effective_rank["default"]
        left, right = left[:, :rank], right[:rank]
        outside = change - left @ (left.mT @ change)
        outside = outside - (outside @ right.mT) @ right
        moved.append(change)
        inside.append(change - outside)
    return _leak(moved, inside, trial.drift(model))


def _affine(layer: Any) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()


def _leak(moved: list[Tensor], inside: list[Tensor], drift: float) -> dict[str, float]:
    whole, part = (sqrt(sum(float(m.square().sum()) for m in all_)) for all_ in (moved, inside))
    return {"moved": whole, "inside": part / whole, "drift": drift}


def run_leak(preset: str, seeds: Sequence[int], out: RecordFolder) -> None:
    """Every way with every optimizer; one record for each seed, of model and data.

    Errors as of `leak` and `RecordFolder`; ValueError for an unknown preset.
    """
    size = one_of("preset", preset, LEAK_SIZES)
    shared = {"figure": "leak", "title": LEAK_TITLE, "preset": preset, "size": asdict(size)}
    with out.held("leak", shared):
        for seed in seeds:
            config = {**shared, "order": 0, "seed": seed, "tau": TAU, "share": SHARE}
            path = out.missing(f"00-leak-seed{seed}", config)
            if path is None:
                out.progress(f"seed {seed}", len(PROJECTIONS) * len(LEAK_RATES))
                continue
            with out.writing(path, **config, **environment()) as writer:
                for way, name in product(PROJECTIONS, LEAK_RATES):
                    what = {"steps": size.steps, "way": way, "optimizer": name}
                    writer.write("share", **what, **leak(way, name, size, seed))
                    out.progress(f"{way}, {name} (seed {seed})", 1)


def leak_rows(folder: Path) -> list[list[str]]:
    """The table as text, its head first: a line for every way and a column for every optimizer."""
    rows = [row for path in record_paths(folder) for row in read_rows(path)]
    shares = [row for row in rows if row["type"] == "share"]
    table = [["what is projected", *LEAK_RATES]]
    for way in PROJECTIONS:
        own = [row for row in shares if row["way"] == way]
        cells = [_cell([row for row in own if row["optimizer"] == name]) for name in LEAK_RATES]
        table.append([way, *cells])
    return table


def leak_table(folder: Path) -> Table:
    """The same for the terminal."""
    caption = (
        "Norm of the update's part inside the kept space, as a share of its norm; in brackets the "
        "change of the outputs on old data, as a share of theirs. The space of attach and project_ "
        f"is that of old inputs at tau {TAU:g}, that of OSF the larger half of each weight's "
        "singular directions."
    )
    title = f"{LEAK_TITLE}, {len(record_paths(folder))} seeds"
    return table_of(leak_rows(folder), title, caption)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "-"
    inside, drift = (sum(row[key] for row in rows) / len(rows) for key in ("inside", "drift"))
    return f"{inside:.2g} ({drift:.2g})"
