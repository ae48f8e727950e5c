"""``teleport pack`` and ``unpack``: finished runs in few files, and back."""

from pathlib import Path
from typing import Annotated

import typer

from teleport.cli.loading import loading
from teleport.cli.output import count_of


def pack_folders(
    folder: Annotated[Path, typer.Argument(help="Folder of finished runs; all below it, too.")],
    study: Annotated[Path, typer.Argument(help="New folder for the packed study.")],
) -> None:
    """Pack the records of finished runs into one list and a few Parquet tables; lose no number."""
    with loading():
        from teleport.lab.records import pack as packing
        from teleport.runtime.progress import progress_of

    with progress_of(None, "record") as progress:
        many = packing.pack(folder, study, lambda done, of: progress("packing", done, of))
    typer.echo(f"{count_of(many, 'record')} packed in {study}")


def unpack_study(
    folder: Annotated[Path, typer.Argument(help="Packed study, or a folder in one.")],
    out: Annotated[Path, typer.Argument(help="New folder for the records.")],
) -> None:
    """Write the records of a packed study as JSON lines again, as runs write them."""
    with loading():
        from teleport.lab.records import pack as packing

    typer.echo(f"{count_of(packing.unpack(folder, out), 'record')} written below {out}")
