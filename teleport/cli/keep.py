"""``teleport continual`` and ``keep``: keep what was learned before, and what that costs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from teleport.cli.loading import loading
from teleport.cli.options import ResumeOption, Threads, comma_separated, out_option, seed_option
from teleport.cli.study import recording
from teleport.lab.experiments.choices import KEEP_NAMES, METHOD_NAMES, SEQUENCE_NAMES
from teleport.lab.experiments.entry import one_of


def continual(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SEQUENCE_NAMES)}.")] = "digits",
    preset: Annotated[str, typer.Option(help="Size: tiny or cpu.")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 8,
    first_seed: Annotated[
        int, seed_option("The first one; with --tune it is added to that of tuning.")
    ] = 0,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Some of {','.join(METHOD_NAMES)}, with commas; default all."),
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(help="Share of input energy kept, in (0, 1]; may be repeated."),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate of every method; may be repeated. Default: tuned."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="A grid of learning rates on validation images.")
    ] = False,
    resume: ResumeOption = False,
    out: Annotated[Path | None, out_option("<name>")] = None,
    threads: Threads = None,
) -> None:
    """Learn tasks in turn, keeping the old ones; print a table, write records and a figure."""
    one_of("sequence", name, dict.fromkeys(SEQUENCE_NAMES))  # at once; the rest with PyTorch
    with loading():
        from teleport.lab.keeping.training import (
            LR_GRID,
            TUNING_SEED,
            SequenceRun,
            default_strategies,
            run_strategies,
        )

    rates = list(LR_GRID) if tune and not lr else lr
    strategies = default_strategies(name, comma_separated(methods), tau, rates)
    course = SequenceRun(name, preset, "validation" if tune else "test")
    course.size()
    start = first_seed + TUNING_SEED if tune else first_seed
    numbers = range(start, start + seeds)
    total = course.steps(course.sets()) * len(strategies) * seeds
    with recording(name, out, resume, threads, total, "step") as to:
        run_strategies(course, strategies, numbers, to)


def keep(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(KEEP_NAMES)}.")],
    preset: Annotated[
        str, typer.Option(help="Size: tiny, in seconds, or cpu; words: many; edit: hundred.")
    ] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    first_seed: Annotated[int, seed_option("The first one.")] = 0,
    methods: Annotated[
        str | None, typer.Option(help="words, edit: some of the methods, with commas; default all.")
    ] = None,
    choosing: Annotated[
        bool,
        typer.Option(
            "--choosing", help="words: with those kept for choosing settings, not for reports."
        ),
    ] = False,
    resume: ResumeOption = False,
    out: Annotated[Path | None, out_option("<name>")] = None,
    threads: Threads = None,
) -> None:
    """Fine-tune and edit real models with the null space and with its rivals.

    words: a sentence model learns new words while an index of old sentences stays as it is. edit: a
    language model is told new facts, in closed form or by training. leak: how much of an update
    lies inside the space to be kept, by optimizer. Records of every run, a table, a figure. What
    they need is in the extra keeping; weights are fetched by you alone.
    """
    one_of("experiment", name, dict.fromkeys(KEEP_NAMES))  # at once; the rest with PyTorch
    if choosing and name != "words":
        raise ValueError("--choosing is of words only")
    if methods and name == "leak":
        raise ValueError("--methods is of words and edit only")
    with loading():
        from teleport.lab.keeping.comparison import Recipe, chosen_ways
        from teleport.lab.keeping.edits import DEFAULT_EDITS, run_edits
        from teleport.lab.keeping.facts import FACT_SIZES
        from teleport.lab.keeping.frontier import DEFAULT_WAYS, run_words
        from teleport.lab.keeping.leak import LEAK_RATES, LEAK_SIZES, PROJECTIONS, run_leak
        from teleport.lab.keeping.words import WORD_SIZES, require_packages

    experiments: dict[str, tuple[Mapping[str, Any], Callable[..., Any], Sequence[Recipe]]] = {
        "words": (WORD_SIZES, partial(run_words, choosing=choosing), DEFAULT_WAYS),
        "edit": (FACT_SIZES, run_edits, DEFAULT_EDITS),
        "leak": (LEAK_SIZES, run_leak, ()),
    }
    sizes, experiment, known = experiments[name]
    ways = chosen_ways(known, methods)
    runs = partial(experiment, ways=ways) if ways else experiment
    size = one_of("preset", preset, sizes)
    require_packages("" if name == "leak" else size.model)
    numbers = range(first_seed, first_seed + seeds)
    total = seeds * (len(ways) * size.steps or len(PROJECTIONS) * len(LEAK_RATES))
    with recording(name, out, resume, threads, total, "step") as to:
        runs(preset, numbers, to)
