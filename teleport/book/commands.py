"""``teleport book``: build, serve and check."""

import time
from pathlib import Path
from typing import Annotated

import typer

from teleport.book.build import build, over_budget
from teleport.book.links import built_pages, check_links
from teleport.book.manifest import read_book
from teleport.book.serve import server
from teleport.errors import BookError

app = typer.Typer(help="Build the book of the chapters, show it, check it.", no_args_is_help=True)

File = Annotated[Path, typer.Option("--book", help="What the book is made of.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the pages.")]
BOOK, OUT = Path("book.toml"), Path("build/book")


@app.command("build")
def build_book(
    execute: Annotated[
        bool, typer.Option("--execute", help="Run all chapters first, in a scratch folder.")
    ] = False,
    out: Out = OUT,
    book: File = BOOK,
) -> None:
    """Build the web book from the chapters with their committed outputs, or from new ones."""
    start = time.monotonic()
    page = build(
        book, out, run=execute, started=lambda chapter: typer.echo(f"running {chapter.file.name}")
    )
    typer.echo(
        f"built in {time.monotonic() - start:.0f} s; open {page} or run `teleport book serve`"
    )


@app.command()
def slides(out: Out = Path("build/slides"), book: File = BOOK) -> None:
    """Make slides of every chapter for a class: theorems, code, figures; the text as notes."""
    page = build(book, out, form="slides")
    typer.echo(f"open {page}; the key S shows the speaker's notes, ? all keys")


@app.command()
def epub(out: Out = Path("build/epub"), book: File = BOOK) -> None:
    """Make an e-book with the equations as MathML and the figures as still pictures."""
    typer.echo(f"made {build(book, out, form='epub')}")


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000, out: Out = OUT
) -> None:
    """Show the built book to a browser on this machine, until Ctrl-C."""
    with server(out, port) as running:
        typer.echo(f"the book is at http://127.0.0.1:{running.server_address[1]}/ (Ctrl-C ends)")
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended")


@app.command("check")
def check_book(out: Out = OUT, book: File = BOOK) -> None:
    """Check book.toml and its files, and if the book is built, its links and execution times."""
    described = read_book(book)
    typer.echo(f"{book}: {len(described.chapters)} chapters, {len(described.pages)} pages, ok")
    problems: list[str] = []
    if out.is_dir():
        problems += check_links(out) + over_budget(described, out)
        typer.echo(f"{out}: {len(built_pages(out))} pages checked")
    else:
        typer.echo(f"{out}: not built, so links and times were not checked")
    if problems:
        raise BookError("\n".join([f"{len(problems)} found", *problems]))
