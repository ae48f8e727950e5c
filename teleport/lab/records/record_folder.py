"""A folder in which a command leaves a record for each thing that it looks at."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teleport.errors import RunError
from teleport.lab.records.checkpoint import locked
from teleport.lab.records.runs import has_begun, read_rows, twice
from teleport.lab.records.sameness import check_folder, is_complete
from teleport.lab.records.study import record_paths
from teleport.lab.records.writer import RecordWriter


@dataclass(frozen=True)
class RecordFolder:
    """Where records are to be, and how.

    Attributes:
        path: of the folder, which is there.
        resume: leave complete records as they are, and make those again that were broken off;
            without it a record that is there is an error.
        command: the command line, for the records.
        progress: told what is being computed, and where steps are counted, those done since.
    """

    path: Path
    resume: bool = False
    command: str = ""
    progress: Callable[..., None] = lambda what, steps=0: None

    @contextmanager
    def held(
        self,
        study: str,
        shared: dict[str, Any],
        added: Collection[str] = (),
        names: Mapping[tuple[str, int], str] | None = None,
    ) -> Iterator[None]:
        """The folder locked, for records of a study; errors as of `locked` and `check_folder`."""
        with locked(self.path / ".lock", str(self.path)):
            check_folder(self.path, study, shared, added, names)
            yield

    def missing(self, name: str, own: dict[str, Any]) -> Path | None:
        """Where the record of this name is to be made; None if it is there, and complete.

        RunError if it is a record of something else than its first row shall say.
        """
        path = self.path / f"{name}.jsonl"
        if self.resume:
            if is_complete(path, own):
                return None
            path.unlink(missing_ok=True)
        return path

    @contextmanager
    def writing(self, path: Path, **config: Any) -> Iterator[RecordWriter]:
        """The writer of a record, which ends it; with its first row, if that is known already.

        Errors as of `RecordWriter`.
        """
        with RecordWriter(path) as writer:
            if config:
                writer.write("config", command=self.command, **config)
            yield writer
            writer.write("end", status="finished")


def read_records(
    folder: Path, study: str, what: str, *, row: str = "", unfinished: bool = False
) -> list[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """Path, first row and other rows of the records of a study, which is all that is there.

    Those that were broken off, which ``--resume`` makes again, come only if they are asked for, and
    if a type of rows is given, those without any such ``row`` not at all.

    Raises:
        RunError: if there is none, or one is damaged or of something else, or two are of the same.
    """
    first: dict[str, Path] = {}
    found = []
    for path in filter(has_begun, record_paths(folder)):
        config, *rows = read_rows(path)
        if config.get("figure") != study:
            raise RunError(f"{path} is not a record of `teleport {study}`")
        key = [config.get(name) for name in ("experiment", "title", "optimizer", "seed")]
        one = first.setdefault(json.dumps(key), path)
        if one != path:
            raise RunError(twice(one, path, f"{config['title']} (seed {config['seed']})"))
        types = [one["type"] for one in rows]
        if (unfinished or types[-1:] == ["end"]) and (not row or row in types):
            found.append((path, config, rows))
    if not found:
        raise RunError(f"{folder} holds no {what}; give a folder `teleport {study}` has written")
    return found
