"""Several ways to change one model, from the same start, each with every seed: their records."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from teleport.errors import NonFiniteLossError
from teleport.lab.experiments.entry import one_of
from teleport.lab.experiments.run import Progress
from teleport.lab.records.checkpoint import locked
from teleport.lab.records.folders import slug
from teleport.lab.records.sameness import check_folder, is_complete
from teleport.lab.records.writer import RecordWriter, environment

Start = TypeVar("Start")

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
        method: one of `SETTINGS`.
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
    """Those of some methods, whose names have commas between them; all by default.

    Raises:
        ValueError: for a method that none of the ways is of.
    """
    known = dict.fromkeys(way.method for way in ways)
    names = list(known) if methods is None else methods.split(",")
    for name in names:
        one_of("method", name, known)
    return [way for way in ways if way.method in names]


def run_ways(
    kind: str,
    shared: dict[str, Any],
    ways: Sequence[Recipe],
    seeds: Sequence[int],
    out: Path,
    begin: Callable[[int], Start],
    rows: Callable[[Start, Recipe, int, Callable[[int], None]], Iterator[dict[str, Any]]],
    *,
    steps: int,
    resume: bool,
    command: str,
    progress: Progress,
) -> list[Path]:
    """One record file for every way and seed.

    Args:
        kind: of the records, as `teleport.lab.records.schema` names it.
        shared: what the first row of each says.
        ways: the ways.
        seeds: the seeds.
        out: an existing folder for the records.
        begin: makes what all ways of a seed share; called only if one has to run.
        rows: the evaluations of one way, which tells its last argument of every step.
        steps: of one way, for the progress of those that are there already.
        resume: leave finished records of the same configuration as they are.
        command: the command line, for the record.
        progress: told about every step.

    Raises:
        RunError: if the folder is in use or holds other records, or one cannot be written.
    """
    paths = []
    with locked(out / ".lock", str(out)):
        check_folder(out, kind, shared)
        for seed in seeds:
            start: Start | None = None
            for order, way in enumerate(ways):
                path = out / f"{order:02d}-{slug(way.name)}-seed{seed}.jsonl"
                paths.append(path)
                config = {
                    **shared,
                    "arm": way.name,
                    "order": order,
                    "seed": seed,
                    "way": asdict(way),
                }
                what = f"{way.name} (seed {seed})"
                if resume and is_complete(path, config):
                    progress(what, steps)
                    continue
                if resume:
                    path.unlink(missing_ok=True)
                start = begin(seed) if start is None else start
                with RecordWriter(path) as writer:
                    writer.write("config", command=command, **config, **environment())
                    _record(rows(start, way, seed, partial(progress, what)), writer)
    return paths


def _record(rows: Iterator[dict[str, Any]], writer: RecordWriter) -> None:
    status = "interrupted"
    try:
        for row in rows:
            writer.write("evaluation", **row)
        status = "finished"
    except NonFiniteLossError:
        status = "diverged"
    finally:
        writer.write("end", status=status)
