"""Several ways to change one model, from the same start, each with every seed: their records."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from teleport.errors import NonFiniteLossError
from teleport.keeping.keeper import Attachment
from teleport.lab.experiments.entry import one_of
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import Run
from teleport.lab.records.study import Row
from teleport.lab.records.writer import RecordWriter, environment
from teleport.runtime.clock import now

Start = TypeVar("Start")
Model = TypeVar("Model", bound=Any)

SETTINGS = {
    "plain": "",
    "embedding": "",
    "embedding null": "",
    "tokens": "",
    "pull": "lambda",
    "lora": "decay",
    "distil": "weight",
    "osf": "share",
    "attach": "tau",
    "lora null": "tau",
    "attach+distil": "tau",
    "memit": "lambda",
    "edit": "tau",
}
"""Methods, and what their setting is.

``plain``: AdamW. ``embedding``: on the vectors of tokens alone; ``embedding null``: the same behind
`NullSpace.attach`. ``tokens``: a token for each new word, and its vector alone is learned.
``pull``: with lambda / 2 times the squared distance to the start. ``lora``: low-rank adapters, with
weight decay. ``distil``: with this weight times the squared distance of old sentences' vectors to
what they were. ``osf``: PEFT's, which freezes this share of the singular directions of the weights.
``attach``: `NullSpace.attach`, every 10 steps. ``lora null``: adapters in the null space,
`NullSpace.lora_`. ``memit``: a closed form with the second moment of old inputs times lambda as its
ridge. ``edit``: the closed form in the null space, `NullSpace.edit`.
"""

HELD = 0.999
"""Share of energy up to which a space is made, once a seed; smaller ones are taken from it."""

EVERY = 10
"""Steps between two projections."""

RANK = 16
"""Of adapters."""

USES_SPACE = ("attach", "embedding null", "lora null", "attach+distil", "edit")
"""Methods with a null space."""


@dataclass(frozen=True)
class Recipe:
    """A method with its settings.

    Attributes:
        lr: of AdamW; 0 where there is none.
        value: of the method's own setting; see `SETTINGS`.
    """

    method: str
    lr: float
    value: float | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        setting = "" if self.value is None else f" {SETTINGS[self.method]} {self.value:g}"
        return f"{self.method}{setting}" + (f", lr {self.lr:g}" if self.lr else "")


def chosen_ways(ways: Sequence[Recipe], methods: str | None) -> list[Recipe]:
    """Those of some methods, named with commas, else all; ValueError for one that none is of."""
    known = dict.fromkeys(way.method for way in ways)
    names = list(known) if methods is None else methods.split(",")
    for name in names:
        one_of("method", name, known)
    return [way for way in ways if way.method in names]


def run_ways(
    shared: dict[str, Any],
    ways: Sequence[Recipe],
    seeds: Sequence[int],
    out: RecordFolder,
    begin: Callable[[int], Start],
    rows: Callable[[Start, Recipe, int, Callable[[int], None]], Iterator[Row]],
    steps: int,
) -> list[Path]:
    """One record file for every way and seed; the first row of each says what is ``shared``.

    ``begin`` makes what all ways of a seed share, and is called only if one has to run. ``rows``
    are the evaluations of one way, which tells its last argument of every step. The ``steps`` are
    those of one way, for the progress of those that are there already. Errors as of `RecordFolder`.
    """
    paths = []
    with out.held(shared["figure"], shared):
        for seed in seeds:
            start: Start | None = None
            for order, way in enumerate(ways):
                own = {"arm": way.name, "order": order, "seed": seed, "way": asdict(way)}
                config, name = {**shared, **own}, f"{order:02d}-{slug(way.name)}-seed{seed}"
                path = out.missing(name, config)
                told = partial(out.progress, f"{way.name} (seed {seed})")
                paths.append(out.path / f"{name}.jsonl")
                if path is None:
                    told(steps)
                    continue
                start = begin(seed) if start is None else start
                with RecordWriter(path) as writer:
                    writer.write("config", command=out.command, **config, **environment())
                    _record(rows(start, way, seed, told), writer)
    return paths


def _record(rows: Iterator[Row], writer: RecordWriter) -> None:
    status = "interrupted"
    try:
        for row in rows:
            writer.write("evaluation", **row)
        status = "finished"
    except NonFiniteLossError:
        status = "diverged"
    finally:
        writer.write("end", status=status)


def table_of(rows: Sequence[Sequence[str]], title: str, caption: str | None) -> Table:
    """Rows of text for the terminal, their head first."""
    head, *others = rows
    table = Table(*head, title=title, caption=caption)
    for row in others:
        table.add_row(*row)
    return table


def unfinished(runs: Sequence[Run]) -> list[str]:
    """A line for every run that did not get to its end."""
    broken = [run for run in runs if run.status != "finished"]
    return [f"{run.arm} (seed {run.seed}): {run.status}" for run in broken]


def with_own_network(model: Model) -> Model:
    """A copy to be changed of what runs ``model.network``."""
    fresh = copy.copy(model)
    fresh.network = copy.deepcopy(model.network)
    return fresh


def with_adapters(network: nn.Module, layers: list[str], **options: Any) -> nn.Module:
    """The network with low-rank adapters of PEFT, in evaluation mode."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, **options)
    adapted: nn.Module = get_peft_model(network, config).eval()
    return adapted


def looks(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    steps: int,
    every: int,
    attached: Attachment | None,
    told: Callable[[int], None],
) -> Iterator[tuple[int, float]]:
    """Train, and stop for a look at the start and every few steps.

    The loss is that of a step, the first being 1. What is attached to the optimizer projects before
    each look; ``told`` is told of every step.

    Yields:
        Steps done, and the seconds that they took.
    """
    seconds = 0.0
    yield 0, seconds
    for step in range(1, steps + 1):
        started = now()
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        if attached is not None and step % every == 0:
            attached.project()
        seconds += now() - started
        told(1)
        if step % every == 0:
            yield step, seconds


def look_row(found: dict[str, float], step: int, seconds: float, space_seconds: float) -> Row:
    """An evaluation; NonFiniteLossError if a number in it is not finite."""
    if not all(map(isfinite, found.values())):
        raise NonFiniteLossError(f"what is measured is not finite after {step} steps")
    return {"step": step, "train_seconds": seconds, "space_seconds": space_seconds, **found}
