"""``teleport check``: grade answers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from teleport.cli.loading import loading
from teleport.errors import CheckError


def check(
    path: Annotated[Path, typer.Argument(help="A notebook (.ipynb) or a Python file (.py).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds for each cell or statement of the file.")
    ] = 10.0,
) -> None:
    """Grade the exercises in a file; exit code 0: all right, 1: some wrong, 2: unusable file."""
    with loading():
        from teleport.check.grading import grade
        from teleport.cli.show import show_grades
        from teleport.runtime.progress import progress_of

    try:
        with progress_of(None, "cell") as progress:
            before = 0

            def ran(done: int, of: int) -> None:
                nonlocal before
                progress(path.name, done - before, of)
                before = done

            grades = grade(path, time_limit, ran)
    except CheckError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(grades.to_dict(), indent=1))
    else:
        show_grades(grades)
    if not grades.passed:
        raise typer.Exit(1)
