"""The folders of runs: new ones, and those to go on or start over in."""

import re
from contextlib import ExitStack
from datetime import date
from pathlib import Path

from teleport.errors import RunError
from teleport.lab.records.checkpoint import is_locked, locked
from teleport.lab.records.runs import first_row, has_begun
from teleport.lab.records.schema import made_by
from teleport.lab.records.study import record_folders, record_paths, refuse_packed

OF_A_RUN = re.compile(r"\d\d+-.*-seed\d+\.(jsonl|checkpoint(\.new)?)")
"""Names of the files that runs keep."""


def open_folder(
    name: str, out: Path | None, resume: bool = False, force: bool | None = None
) -> Path:
    """The folder of records: a new one, or with ``resume`` or ``force`` the one that is there.

    To start over removes what earlier runs left in ``out``; ``force`` is None of commands that
    cannot. A new one is made by `new_folder`.

    Raises:
        ValueError: if both are wanted, or one of them without ``out``.
        RunError: if the folder is in use, in a packed study, exists already, cannot be made, or is
            to start over and holds other records than of runs; it stays as it is.
    """
    if resume and force:
        raise ValueError("--resume goes on and --force starts over: give one of them")
    if (resume or force) and out is None:
        option = "--resume" if resume else "--force"
        raise ValueError(f"{option} needs the folder to use; give it with --out")
    if out is None or not out.is_dir() or not (resume or force):
        instead = "" if force is None else ", or --force to start over in it"
        return new_folder(name, out, f", or --resume to go on in it{instead}")
    refuse_packed(out)
    if force:
        with ExitStack() as stack:
            stack.enter_context(locked(out / ".lock", str(out)))
            files = _left_by_runs(out)
            for file in files:
                if file.suffix == ".jsonl":  # a sweep, above this folder, holds its records only
                    stack.enter_context(locked(file.with_suffix(".lock"), str(file)))
            for file in files:
                file.unlink()
    return out


def _left_by_runs(folder: Path) -> list[Path]:
    """Records and checkpoints of runs, and if there are any the table and the figure of them."""
    own = [file for file in sorted(folder.iterdir()) if OF_A_RUN.fullmatch(file.name)]
    for record in sorted(folder.glob("*.jsonl")):
        if record not in own or (has_begun(record) and made_by(first_row(record)) != "run"):
            raise RunError(
                f"{record} is no record of `teleport run`: --force removes nothing where other "
                "records are; give another --out"
            )
    shown = [folder / name for name in ("table.txt", "figure.png")] if own else []
    return own + [file for file in shown if file.exists()]


def new_folder(name: str, out: Path | None, instead: str = "") -> Path:
    """Make the folder of a new run: ``out``, or ``runs/<date>-<name>`` with a number if taken.

    The message of one that is there already says what the command can do ``instead``.

    Raises:
        RunError: if the folder exists already, is in a packed study, or cannot be made or written
            to.
    """
    if out is not None:
        return _make_folder(out, instead)
    base = Path("runs") / f"{date.today().isoformat()}-{name}"
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 1000))
    return _make_folder(next(folder for folder in candidates if not folder.exists()))


def _make_folder(folder: Path, instead: str = "") -> Path:
    refuse_packed(folder)
    try:
        folder.mkdir(parents=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except FileExistsError as error:
        if not folder.is_dir():
            raise RunError(f"{folder} is not a folder; give another --out") from error
        raise RunError(
            f"{folder} exists already and runs never share a folder; give another --out{instead}"
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; choose a folder with --out"
        ) from error
    return folder


def is_going_on(folder: Path) -> bool:
    """Whether a process runs in a folder, in one below, or in the sweep that it is part of."""
    above = (parent / ".lock" for parent in folder.absolute().parents[:2])
    return any(map(is_locked, (*folder.rglob(".lock"), *above)))


def begun(folder: Path) -> bool:
    """Whether there is a record in a folder or below that has begun."""
    return any(has_begun(path) for place in record_folders(folder) for path in record_paths(place))


def slug(name: str) -> str:
    """A name as part of a file's."""
    name = re.sub(r"(?<=\de)\+(?=\d)", "", name)  # 1e+30 is 1e30, and not the 1e-30 of another name
    kept = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    return "-".join(part for part in kept.split("-") if part)
