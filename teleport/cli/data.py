"""``teleport data``: fetch, list and verify data sets."""

import os
from typing import Annotated

import typer

from teleport.cli.loading import loading
from teleport.cli.output import print_tables, say

app = typer.Typer(help="Fetch, list and verify data sets.", no_args_is_help=True)


def _say_if_missing() -> None:
    """Say it where $TELEPORT_DATA leads nowhere, which finds as little as an empty folder."""
    from teleport.data.store import ROOT_VARIABLE, root_folder  # late: help needs neither

    if os.environ.get(ROOT_VARIABLE) and not (root := root_folder(None)).is_dir():
        say(f"{ROOT_VARIABLE} is {root}, which is no folder: only what is embedded is there")


@app.command("list")
def list_sets() -> None:
    """List the data sets, where their files are, and how to get those that are missing."""
    with loading():
        from rich.table import Table

        from teleport import data as datasets

    _say_if_missing()
    table = Table("name", "kind", "what", "where", "to get it")
    for info in datasets.available():
        table.add_row(info.name, info.kind, info.what, info.where, info.how)
    print_tables(table)


@app.command("fetch")
def fetch_sets(names: Annotated[list[str], typer.Argument(help="Data sets.")]) -> None:
    """Download data sets to $TELEPORT_DATA or the user's cache folder and check them."""
    with loading():
        from teleport import data as datasets

    for name in names:
        typer.echo(f"{name}: {datasets.fetch(name)}")


@app.command("verify")
def verify_sets(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets; default: all that are there.")
    ] = None,
) -> None:
    """Check the files of data sets against their checksums; exit code 1 if one is not ok."""
    with loading():
        from rich.table import Table

        from teleport import data as datasets

    _say_if_missing()
    chosen = names or [info.name for info in datasets.available() if not info.how]
    # Several sets may be made of the same file: it is checked once.
    statuses = {status.path: status for name in chosen for status in datasets.verify(name)}
    table = Table("file", "state", "detail")
    for status in statuses.values():
        table.add_row(str(status.path), status.state, status.detail)
    print_tables(table)
    if any(status.state != "ok" for status in statuses.values()):
        raise typer.Exit(1)
