"""What the commands print: tables and figures of a folder of records."""

import math
import textwrap
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

import typer
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Column, Table

from teleport.check.grading import Grades
from teleport.cli.output import console, count_of, print_tables, say
from teleport.errors import RunError, os_errors_as
from teleport.lab.analysis.connectivity import Lines, interval, read_lines
from teleport.lab.analysis.curves import (
    connectivity_figure,
    effects_figure,
    gap_figure,
    loss_figure,
    matrix_figure,
)
from teleport.lab.analysis.outcomes import (
    FolderOutcome,
    gap_text,
    how,
    length,
    number_text,
    ratio_text,
    smaller,
    without_controls,
)
from teleport.lab.analysis.sensitivity import Outcomes, read_outcomes
from teleport.lab.bench import against
from teleport.lab.bench.plots import scaling_figure
from teleport.lab.bench.tables import Sheet, curves, holds_benchmarks, read_benchmarks, sheets
from teleport.lab.experiments.table import EXPERIMENTS
from teleport.lab.keeping.comparison import table_of
from teleport.lab.keeping.frontier_report import frontier_figure, frontier_table
from teleport.lab.keeping.leak import leak_table
from teleport.lab.keeping.report import forgetting_figure, forgetting_tables
from teleport.lab.paper.input_energy import Measured, read_spectra
from teleport.lab.paper.moves import Moves, read_moves
from teleport.lab.paper.moves_report import MOVE_COLUMNS, move_cells, room
from teleport.lab.paper.plots import product_figure, spectrum_figure, threshold_figure
from teleport.lab.paper.products import read_product
from teleport.lab.paper.savings import read_savings
from teleport.lab.paper.threshold import Trajectories, read_trajectories
from teleport.lab.records.compare import ArmSummary, Comparison, summarise
from teleport.lab.records.folders import slug
from teleport.lab.records.runs import SPLITS, FloatArray, Run, by_arm, read_runs
from teleport.lab.records.sameness import check_alike


def show(folder: Path) -> None:
    """Print the tables of a folder of records and draw its figures, whatever it holds.

    RunError if it holds no records, or damaged ones, or cannot be written to.
    """
    if holds_benchmarks(folder):
        _show_benchmarks(folder)
        return
    kinds: dict[str, Callable[[Path], None]] = {
        "spectrum": _show_spectra,
        "tau": _show_trajectories,
        "moves": _show_moves,
        "saving": _show_savings,
        "product": _show_product,
        "connectivity": _show_lines,
        "sensitivity": _show_outcomes,
        "words": _show_ways,
        "edit": _show_ways,
        "leak": lambda folder: _keep(folder, [leak_table(folder)]),
    }
    kind = str(read_runs(folder)[0].config.get("figure", ""))
    kinds.get(kind, _show_runs)(folder)


def _show_spectra(folder: Path) -> None:
    found = read_spectra(folder)
    looked_after = dict.fromkeys(steps for measured in found for steps in measured.by_step)
    figures = {f"figure-{steps}-steps.png": spectrum_figure(found, steps) for steps in looked_after}
    _keep(folder, [_spectrum_table(measured) for measured in found], figures)


def _show_trajectories(folder: Path) -> None:
    found = read_trajectories(folder)
    _keep(folder, [_threshold_table(found)], {"figure.png": threshold_figure(found)})


def _show_moves(folder: Path) -> None:
    found = read_moves(folder)
    tables = [table for moves in found for table in (_moves_table(moves), _room_table(moves))]
    _keep(folder, tables)


def _show_savings(folder: Path) -> None:
    columns = ("experiment", "optimizer", "arm", "k", "growth", "k after", "saved", "cost", "auto")
    table = Table(
        *(Column(name, justify="left" if n < 3 else "right") for n, name in enumerate(columns)),
        title="what a teleport should save and what it costs, in steps of the optimizer",
        caption="k: a step as a share of the way to the lowest point along the gradient; beyond 2 "
        'the loss rises. auto: whether growth="auto" goes, with room in its budget, and how many '
        "steps it expects to save",
    )
    for s in read_savings(folder):
        numbers = (s.stride, s.growth, s.stride_after, s.saved, s.cost)
        says = f"{'yes' if s.pays else 'no'}, {s.expected:.2g}"
        table.add_row(*s.key, *(f"{n:.2g}" for n in numbers), says)
    _keep(folder, [table])


def _show_product(folder: Path) -> None:
    config, found = read_product(folder)
    title = f"{config['title']}: layer {found.layer}, after {config['trained']} training steps"
    table = Table("matrix", "shape", "what", title=title)
    d_out, d_in = found.weight.shape
    table.add_row("X", f"{found.count} x {d_in}", "inputs, one row per position")
    table.add_row("W", f"{d_out} x {d_in}", "weights" + (" and bias" if found.bias else ""))
    table.add_row("Z = X Wᵀ", f"{found.count} x {d_out}", "outputs")
    table.add_row("D", f"{d_out} x {found.count}", "derivative of the loss by the outputs")
    table.add_row("g = D X", f"{d_out} x {d_in}", "gradient")
    _keep(folder, [table], {"figure.png": product_figure(found, title)})


def _show_lines(folder: Path) -> None:
    found = read_lines(folder)
    _keep(folder, [_barrier_table(found)], {"figure.png": connectivity_figure(found)})


def _barrier_table(found: list[Lines]) -> Table:
    """The highest loss above the straight line, split by split."""
    table = Table(
        "experiment",
        "lr",
        Column("seeds", justify="right"),
        "line to",
        "growth",
        *(f"barrier, {split} loss" for split in SPLITS),
        title="loss on the line from the plain network to another one",
        caption="Barrier: how far the loss rises above the straight line between the losses of the "
        "ends; mean over seeds with the half width of its 95 % interval.",
    )
    for lines in found:
        for to in lines.others:
            grown = lines.growths.get(to)
            reached = "-" if grown is None else f"{grown.mean():.2f}"
            cells = (_with_interval(lines.barriers(to, split)) for split in SPLITS)
            seeds, config = str(len(lines.losses[to, "train"])), lines.config
            table.add_row(config["experiment"], f"{config['lr']:g}", seeds, to, reached, *cells)
        table.add_section()
    return table


def _with_interval(values: FloatArray) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    middle, half = interval(values)
    return f"{middle:.4f} ± {half:.4f}"


def _show_outcomes(folder: Path) -> None:
    found = read_outcomes(folder)
    drawn = effects_figure([each.effects for each in found], str(found[0].config["title"]))
    _keep(folder, [_effect_table(each) for each in found], {"figure.png": drawn})


def _show_ways(folder: Path) -> None:
    runs = read_runs(folder)
    _keep(folder, [frontier_table(runs)], {"figure.png": frontier_figure(runs)})


def _effect_table(outcomes: Outcomes) -> Table:
    """The effect of every factor on the log loss of a teleport against none."""
    found, total = outcomes.effects, len(outcomes.places)
    table = Table(
        "term",
        Column("effect on the log loss", justify="right"),
        "",
        title=f"{outcomes.config['title']}: {outcomes.design}, {total} points",
        caption=f"Change from the low to the high end of a factor's range, ± the half width of its "
        f"95 % interval; *: it leaves 0 out. {found.explained:.0%} of the variance explained; "
        f"{outcomes.rolled_back} teleports rolled back, {outcomes.diverged} trainings diverged.",
    )
    effects = zip(found.names, found.values, found.half_widths, found.resolved, strict=True)
    return _with_rows(table, ((n, f"{v:+.4f} ± {h:.4f}", "*" * r) for n, v, h, r in effects))


def _keep(
    folder: Path,
    tables: list[Table],
    figures: dict[str, Figure] | None = None,
    runs: Iterable[Run] = (),
) -> None:
    """Print tables and what diverged, keep the tables as text beside the figures, say where."""
    print_tables(*tables)
    say_diverged(runs)
    advice = (
        f"; the records are complete, and `teleport figure {folder}` draws them when there is room"
    )
    with os_errors_as(RunError, f"cannot write the table and the figures to {folder}", advice):
        folder.mkdir(parents=True, exist_ok=True)  # one in a packed study need not be there
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            console(file=file).print(*tables)
        for name, drawn in (figures or {}).items():
            drawn.savefig(folder / name, dpi=150)
    names = ["records", "table.txt", *(figures or {})]
    typer.echo(f"{', '.join(names[:-1])} and {names[-1]} are in {folder}")


def _spectrum_table(measured: Measured) -> Table:
    """Directions that every threshold keeps, layer by layer."""
    taus = list(next(iter(measured.by_step.values()))[0].ranks)
    right = [Column(f"tau {tau:g}", justify="right") for tau in taus]
    config = measured.config
    table = Table(
        "steps",
        "layer",
        Column("inputs", justify="right"),
        *right,
        title=f"{config['title']}: input directions kept, batch of {config['teleport_batch']}",
        caption=f"trained with {config['optimizer']}, lr {config['lr']:g}",
    )
    for step, layers in measured.by_step.items():
        for s in layers:
            ranks = (str(s.ranks.get(tau, "-")) for tau in taus)
            table.add_row(str(step), s.layer, str(s.d_in), *ranks)
        table.add_section()
    return table


def _threshold_table(found: Trajectories) -> Table:
    """Gradient norm and loss after every teleport step, a column for every threshold."""
    table = Table(
        "teleport steps",
        *(f"tau {tau:g}" for tau in found.by_tau),
        title=f"{found.config['title']}: gradient norm / loss on the teleport batch",
        caption=f"after {found.config['trained']} training steps, teleport step size "
        f"{found.config['teleport_lr']:g}; '-': not followed beyond 1000 x the gradient norm",
    )
    for number, points in enumerate(zip_longest(*found.by_tau.values())):
        cells = ("-" if p is None else f"{p.grad_norm:.4g} / {p.loss:.4f}" for p in points)
        table.add_row(str(number), *cells)
    return table


def _moves_table(moves: Moves) -> Table:
    """What became of a teleport, a row for every threshold; of all seeds the mean or the most."""
    config = moves.config
    table = Table(
        *(Column(name, justify="left" if name == "outcome" else "right") for name in MOVE_COLUMNS),
        title=f"{config['title']}: growth {config['growth']:g} asked for, batch of "
        f"{config['teleport_batch']}{', evaluation mode' * config['evaluating']}",
        caption=f"after {config['trained']} training steps; drifts are shares of the loss, the "
        "largest of all seeds; a move that the guard undid is shown as it was",
    )
    return _with_rows(table, (move_cells(moves, tau) for tau in moves.by_tau))


def _room_table(moves: Moves) -> Table:
    """Input directions that are free, layer by layer, and whether the layer moves at tau = 1."""
    right = [Column(f"tau {tau:g}", justify="right") for tau in moves.by_tau]
    table = Table(
        "layer",
        Column("inputs", justify="right"),
        *right,
        f"at tau {next(iter(moves.by_tau)):g}",
        title=f"free input directions, seed {moves.config['seed']}",
        caption="'-': not looked at, as the inputs depend on no parameter",
    )
    return _with_rows(table, room(moves))


def draw_report(found: list[FolderOutcome], figures: Path) -> None:
    """A figure for every experiment of a report, into a folder."""
    for name in dict.fromkeys(block.experiment for block in found):
        rows = {
            f"{block.optimizer} ({block.folder})": without_controls(block)
            for block in found
            if block.experiment == name
        }
        title = EXPERIMENTS[name].title if name in EXPERIMENTS else name
        config = next(b for b in found if b.experiment == name).runs[0].config
        matrix_figure(rows, title + smaller(config)).savefig(figures / f"{slug(name)}.png", dpi=150)


def show_grades(grades: Grades) -> None:
    """The table of points, then what is to be said about the exercises that failed."""
    table = Table("exercise", "where", Column("points", justify="right"), "of", "theorem")
    for exercise in grades.exercises:
        theorem = next((v.theorem for v in exercise.verdicts if not v), "")
        numbers = f"{exercise.points:g}", f"{exercise.possible:g}"
        table.add_row(escape(exercise.name), exercise.place, *numbers, theorem)
    table.add_section()
    table.add_row("total", "", f"{grades.points:g}", f"{grades.possible:g}", "")
    print_tables(table)
    for exercise in grades.exercises:
        if not exercise.passed:
            said = [str(verdict) for verdict in exercise.verdicts if not verdict]
            typer.echo("\n".join([f"\n{exercise.name} ({exercise.place})", *said]))
            if exercise.reason:
                typer.echo(textwrap.indent(exercise.reason, "  "))
    for exercise in grades.exercises:
        if exercise.note:
            typer.echo(f"\n{exercise.name}: {exercise.note}")


def _show_runs(folder: Path) -> None:
    runs = read_runs(folder)
    if "sequence" in runs[0].config:
        tables, drawn = forgetting_tables(runs), forgetting_figure(runs)
    else:
        check_alike(runs)
        tables, drawn = _compared(runs)
    _keep(folder, tables, {"figure.png": drawn}, runs)


def say_diverged(runs: Iterable[Run]) -> None:
    """Why runs diverged, a line for each that did."""
    for run in runs:
        if run.status == "diverged":
            say(f"diverged: {run.path}: {run.reason}")


def _show_benchmarks(folder: Path) -> None:
    """Print the tables of benchmarks, keep them as text, draw the scaling figure, say where."""
    found = read_benchmarks(folder)
    tables = [_sheet(sheet) for benchmark in found.values() for sheet in sheets(benchmark)]
    figures = {}
    if "scaling" in found:
        title = found["scaling"].title
        figures["scaling.png"] = scaling_figure(curves(found["scaling"]), title)
    _keep(folder, tables, figures)


def show_changes(found: list[against.Change]) -> None:
    """Print what operations cost in two records."""
    print_tables(_sheet(against.sheet(found)))


def _sheet(sheet: Sheet) -> Table:
    return table_of([sheet.columns, *sheet.rows], sheet.title, sheet.caption or None)


def _with_rows(table: Table, rows: Iterable[Iterable[str]]) -> Table:
    for row in rows:
        table.add_row(*row)
    return table


def _compared(runs: list[Run]) -> tuple[list[Table], Figure]:
    summaries, title = summarise(runs), _title(runs)
    if len(summaries) > MOST_COLUMNS:
        return [_many(summaries)], gap_figure(summaries, title)
    return [_losses(runs), _summaries(summaries)], loss_figure(runs, title)


def _title(runs: list[Run]) -> str:
    config = runs[0].config
    name, optimizer = config["experiment"], config["settings"]["optimizer"]
    what = EXPERIMENTS[name].title if name in EXPERIMENTS else name
    seeds = count_of(len({run.seed for run in runs}), "seed")
    lines = [f"{what}{smaller(config)} - {optimizer}, {seeds}"]
    if "size" in config:  # older records name neither size nor settings of the teleport
        lines.append(length(config))
    teleports = any(run.config["training"]["teleport"] for run in runs)
    if teleports and "teleport" in config["settings"]:
        lines.append(how(config["settings"]["teleport"]))
    return "\n".join(lines)


def _losses(runs: list[Run]) -> Table:
    """Train and test loss of every arm at each evaluation, averaged over seeds."""
    groups = by_arm(runs)
    table = Table("step", *groups, title="train loss / test loss")
    for i in range(max(len(run.evaluations) for run in runs)):
        step = next(r.evaluations[i]["step"] for r in runs if i < len(r.evaluations))
        table.add_row(str(step), *(_loss_cell(group, i) for group in groups.values()))
    return table


def _loss_cell(group: list[Run], i: int) -> str:
    rows = [run.evaluations[i] for run in group if i < len(run.evaluations)]
    if not rows:
        return "-"
    train, test = (  # a loss that was not finite is missing
        sum(math.nan if r[c] is None else r[c] for r in rows) / len(rows)
        for c in ("train_loss", "test_loss")
    )
    return f"{train:.4f} / {test:.4f}"


_SUMMARY: dict[str, Callable[[ArmSummary], str]] = {
    "ended": lambda s: s.status,
    "final train loss": lambda s: f"{s.train_loss:.4f}",
    "final test loss": lambda s: f"{s.test_loss:.4f}",
    "final test accuracy": lambda s: number_text(s.test_accuracy, "{:.4f}"),
    "seconds training": lambda s: f"{s.train_seconds:.2f}",
    "seconds teleporting": lambda s: f"{s.teleport_seconds:.2f}",
    "gradient-norm growth": lambda s: number_text(s.growth, "x {:.4f}"),
    "drift, teleport batches": lambda s: number_text(s.drift, "{:.1e}"),
    "drift, held-out data": lambda s: number_text(s.held_out_drift, "{:+.4f}"),
    "to own baseline: steps": lambda s: _times(s.to_own, "steps"),
    "to own baseline: seconds": lambda s: _times(s.to_own, "seconds"),
    "to own baseline: log loss": lambda s: _log_gap(s.to_own),
    "to best baseline: steps": lambda s: _times(s.to_best, "steps"),
    "to best baseline: seconds": lambda s: _times(s.to_best, "seconds"),
    "to best baseline: log loss": lambda s: _log_gap(s.to_best),
}

MOST_COLUMNS = 8
"""Arms that fit side by side; more are shown one below the other."""

_IN_BRIEF = {
    "final train loss": "train loss",
    "final test loss": "test loss",
    "seconds training": "train s",
    "seconds teleporting": "teleport s",
    "gradient-norm growth": "growth",
    "drift, teleport batches": "drift",
    "to own baseline: steps": "steps",
    "to own baseline: seconds": "seconds",
    "to own baseline: log loss": "log loss",
}

_CAPTION = (
    "Own baseline: the same arm without teleport; best baseline: the lowest final train loss of "
    "all arms without. Steps and seconds (teleporting included, counted in training steps of the "
    "same process) are ratios of the way to the baseline's final train loss, medians over seeds; "
    "log loss is the mean difference of log train loss, -0.1 being 10 % lower. '-': does not "
    "apply, or never reached."
)


def _many(summaries: list[ArmSummary]) -> Table:
    """One row per arm, and only what the arms are compared by."""
    table = Table(
        Column("arm", no_wrap=True), *_IN_BRIEF.values(), title="summary", caption=_CAPTION
    )
    for summary in summaries:
        ended = "" if summary.status == "finished" else f" ({summary.status})"
        table.add_row(summary.arm + ended, *(_SUMMARY[name](summary) for name in _IN_BRIEF))
    return table


def _summaries(summaries: list[ArmSummary]) -> Table:
    """One column per arm."""
    names = [s.arm for s in summaries]
    table = Table(Column("", no_wrap=True), *names, title="summary", caption=_CAPTION)
    rows = ((name, *map(cell, summaries)) for name, cell in _SUMMARY.items())
    return _with_rows(table, rows)


def _times(comparison: Comparison | None, axis: str) -> str:
    return ratio_text(comparison, axis, "x {:.2f}") or "-"


def _log_gap(comparison: Comparison | None) -> str:
    return gap_text(comparison) or "-"
