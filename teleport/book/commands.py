"""``teleport book``: build, serve and check; questions for teachers."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from teleport.book.build import build, over_budget
from teleport.book.coq_source import PROOFS_FOLDER
from teleport.book.ledger import LEDGER_PATH, proof_rows, record_proofs
from teleport.book.links import built_pages, check_links
from teleport.book.manifest import Chapter, read_book
from teleport.book.proofs import audit_table, check_exercise, check_proofs, recheck
from teleport.book.serve import server
from teleport.errors import BookError
from teleport.runtime.cores import cores
from teleport.runtime.progress import progress_of

app = typer.Typer(help="Build the book of the chapters, show it, check it.", no_args_is_help=True)

File = Annotated[Path, typer.Option("--book", help="What the book is made of.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the pages.")]
BOOK, OUT = Path("book.toml"), Path("build/book")


def _built(
    book: Path, out: Path, *, run: bool = False, form: str = "html", repository: str = ""
) -> Path:
    """A book, with a bar of its chapters while they run, and then of its pages."""
    chapters, begun = len(read_book(book).chapters), 0
    with progress_of(None, "part") as progress:

        def started(chapter: Chapter) -> None:
            nonlocal begun
            typer.echo(f"running {chapter.file.name}")
            progress("running", min(begun, 1), chapters)
            begun += 1

        paged = partial(progress, "pages")
        return build(
            book, out, run=run, form=form, repository=repository, started=started, progress=paged
        )


@app.command("build")
def build_book(
    execute: Annotated[
        bool, typer.Option("--execute", help="Run all chapters first, in a scratch folder.")
    ] = False,
    repository: Annotated[
        str, typer.Option(help="Where it lies on GitHub, owner/name: for links to Colab.")
    ] = "",
    out: Out = OUT,
    book: File = BOOK,
) -> None:
    """Build the web book from the chapters with their committed outputs, or from new ones."""
    start = time.monotonic()
    page = _built(book, out, run=execute, repository=repository)
    typer.echo(
        f"built in {time.monotonic() - start:.0f} s; open {page} or run `teleport book serve`"
    )


@app.command()
def slides(out: Out = Path("build/slides"), book: File = BOOK) -> None:
    """Make slides of every chapter for a class: theorems, code, figures; the text as notes."""
    page = _built(book, out, form="slides")
    typer.echo(f"open {page}; the key S shows the speaker's notes, ? all keys")


@app.command()
def epub(out: Out = Path("build/epub"), book: File = BOOK) -> None:
    """Make an e-book with the equations as MathML and the figures as still pictures."""
    typer.echo(f"made {_built(book, out, form='epub')}")


@app.command()
def questions(
    out: Annotated[Path, typer.Option("--out", help="New folder of the packages.")] = Path(
        "build/questions"
    ),
    book: File = BOOK,
) -> None:
    """Write the sheets' questions, with their answers, for course systems: QTI 1.2 for teachers."""
    from teleport.book.questions import write_questions  # it loads PyTorch

    for name, count in write_questions(read_book(book), out).items():
        typer.echo(f"{out / name}  {count} questions")
    typer.echo("they hold the answers: keep them from students")


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


@app.command()
def proofs(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for what Coq writes; else a scratch one.")
    ] = None,
    independent: Annotated[
        bool, typer.Option("--coqchk", help="Check what was compiled once more, with coqchk.")
    ] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Write the proofs into the theorem ledger.")
    ] = False,
    exercise: Annotated[
        Path | None, typer.Option("--exercise", help="Check a filled-in copy of the exercises.")
    ] = None,
    book: File = BOOK,
) -> None:
    """Compile the machine-checked proofs with Coq, and say what each of them rests on: nothing."""
    start = time.monotonic()
    described = read_book(book)
    folder = described.source / PROOFS_FOLDER
    with tempfile.TemporaryDirectory() as scratch:
        target = out or Path(scratch)
        if exercise is not None:
            typer.echo(check_exercise(folder, exercise, target, cores()))
            return
        before = proof_rows(described.file.parent)
        files = len(list(folder.glob("*.v")))
        with progress_of(files, "file") as progress:

            def proved(name: str) -> None:
                typer.echo(f"proved {name}.v")
                progress("compiling", 1)

            rows = check_proofs(folder, target, cores(), proved)
        if independent:
            recheck(target, sorted({row.file.name for row in rows}))
    if ledger:
        record_proofs(described.file.parent, before)
        typer.echo(f"written into {LEDGER_PATH}")
    typer.echo(audit_table(rows))
    labels = len({row.label for row in rows})
    typer.echo(
        f"{len(rows)} statements for {labels} theorems, no assumptions; "
        f"{time.monotonic() - start:.0f} s"
    )
