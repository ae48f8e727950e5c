"""All commands of ``teleport``, in the order in which it lists them."""

from collections.abc import Callable
from typing import Annotated

import typer

import teleport
from teleport.book.commands import app as book_app
from teleport.cli import bench, check, data, experiments, keep, paper, records, watch

app = typer.Typer(
    name="teleport",
    help="Teleportation with null-space gradient projection: experiments, figures, data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"teleport {teleport.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


_COMMANDS: dict[str, Callable[..., None]] = {
    "list": experiments.list_experiments,
    "run": experiments.run,
    "continual": keep.continual,
    "keep": keep.keep,
    "bench": bench.bench,
    "sweep": experiments.sweep,
    "spectrum": paper.spectrum,
    "tau": paper.tau,
    "moves": paper.moves,
    "saving": paper.saving,
    "product": paper.product,
    "connectivity": paper.connectivity,
    "sensitivity": paper.sensitivity,
    "report": experiments.report,
    "figure": experiments.figure,
    "watch": watch.watch_runs,
    "pack": records.pack_folders,
    "unpack": records.unpack_study,
    "check": check.check,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(data.app, name="data")
app.add_typer(book_app, name="book")
