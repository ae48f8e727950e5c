"""``teleport watch``: a page about runs, while they run and afterwards."""

import time
from pathlib import Path
from typing import Annotated

import typer

from teleport.cli.loading import loading


def watch_runs(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of `teleport run` or sweep, or of several; packed or not."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; default watch.html in the folder.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Write it again and again until the runs have ended.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.2, help="With --follow: seconds from one page to the next.")
    ] = 5.0,
) -> None:
    """Make one HTML page of runs: curves with teleports marked, tables, layers as bars."""
    with loading():
        from teleport.lab.analysis.page import watch_page, write_page
        from teleport.lab.records.folders import begun, is_going_on
        from teleport.runtime.progress import progress_of

    page = folder / "watch.html" if out is None else out
    told = f"the page is {page}; open it in a browser"
    if follow and is_going_on(folder):
        typer.echo(f"{told} (Ctrl-C ends the following)")
    try:
        while follow and is_going_on(folder):
            if begun(folder):
                write_page(page, watch_page(folder, every))
            time.sleep(every)
    except KeyboardInterrupt:
        typer.echo("ended")
    with progress_of(None, "folder") as progress:
        last = watch_page(folder, progress=lambda done, of: progress("reading", done, of))
    write_page(page, last)
    typer.echo(told)
