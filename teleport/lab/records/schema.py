"""What the rows of records hold: the fields that tables and figures read, command by command.

A record may have more fields, and rows of more types. A ``?`` ends the name of a field that need
not be there, because records of an older version lack it or because only some rows have it.

By hand, as most of it is the table below, which a validation library would need as well, and the
messages show the value that is there beside what is expected: msgspec tells its type alone.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teleport.errors import RunError


@dataclass(frozen=True)
class Kind:
    """One kind of values."""

    what: str
    holds: Callable[[Any], bool]


Fields = Mapping[str, "Kind | Fields"]
"""By name, what the fields of an object are."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are(values: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(map(holds, values))


def _is_time(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_matrix(value: Any) -> bool:
    rows = _are(value, lambda row: _are(row, NUMBER_OR_NULL.holds))
    return rows and len(set(map(len, value))) == 1


def _are_ranks(value: Any) -> bool:
    try:
        ranks = isinstance(value, dict) and _are(list(value.values()), _is_count)
        return ranks and all(math.isfinite(float(tau)) for tau in value)
    except ValueError:
        return False


def _is_layer(value: Any) -> bool:
    return isinstance(value, dict) and not _fault(value, _LAYER)


def or_null(kind: Kind) -> Kind:
    """The same, or null: a number that was not finite, or a setting that was not given."""
    return Kind(f"{kind.what} or null", lambda value: value is None or kind.holds(value))


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
COUNT = Kind("an integer >= 0", _is_count)
WIDTH = Kind("an integer >= 1", lambda value: _is_count(value) and value > 0)
TASKS = Kind("an integer from 2 to 1000", lambda value: _is_count(value) and 2 <= value <= 1000)
POINTS = Kind("an integer from 3 to 10000", lambda value: _is_count(value) and 3 <= value <= 10**4)
NUMBER = Kind("a number", _is_number)
NUMBER_OR_NULL = or_null(NUMBER)
LOSS_OR_NULL = or_null(Kind("a number >= 0", lambda value: _is_number(value) and value >= 0))
NUMBERS = Kind("a list of numbers", lambda value: _are(value, _is_number))
SHARES = Kind("a list of numbers", lambda value: value == [] or _are(value, _is_number))
POSITIVE = Kind("a number > 0", _is_time)
TIMES = Kind("a list of numbers > 0", lambda value: _are(value, _is_time))
MATRIX = Kind("a matrix of numbers", _is_matrix)
RANKS = Kind("an object of integers >= 0 by numbers", _are_ranks)
LAYERS = Kind("a list of layers", lambda value: _are(value, _is_layer))
STATUS = Kind(
    "finished, diverged or interrupted",
    lambda value: value in ("finished", "diverged", "interrupted"),
)


def _all(kind: Kind, *names: str) -> Fields:
    return dict.fromkeys(names, kind)


_LAYER: Fields = {
    **_all(TEXT, "name", "status"),
    "move_norm": NUMBER,
    "groups": COUNT,
    **_all(or_null(COUNT), "d_in", "rank", "null_dim"),
}
_END: Fields = {"status": STATUS, "reason?": TEXT, "step?": COUNT}
_MOMENT: Fields = {**_all(COUNT, "order", "seed"), "title": TEXT}
_BASE: Fields = _all(WIDTH, *"tdnlb")
_TIMES: Fields = _all(TIMES, "seconds", "gradient_seconds")
_TIMED: Fields = {**_all(TEXT, "network", "shape"), **_TIMES}
_MOVED: Fields = _all(NUMBER, "growth", "drift", "held_out_drift")
_WAY: Fields = {
    **_MOMENT,
    **_all(TEXT, "arm", "preset"),
    "way": {"method": TEXT, "lr": NUMBER, "value": NUMBER_OR_NULL},
}
_SPENT: Fields = {"step": COUNT, **_all(NUMBER, "train_seconds", "space_seconds")}

_OWN: dict[str, dict[str, Fields]] = {
    "run": {
        "config": {
            **_all(TEXT, "experiment", "arm", "baseline"),
            **_all(COUNT, "order", "seed"),
            "training": {"lr": NUMBER, "teleport": FLAG, "rival?": TEXT},
            "settings": {
                **_all(TEXT, "optimizer", "preset", "activation?"),
                "teleport?": {
                    "schedule": _all(COUNT, "epochs", "batches", "warmup_steps"),
                    "batch_size": COUNT,
                    "steps": or_null(COUNT),
                    "tau": NUMBER,
                    **_all(NUMBER_OR_NULL, "lr", "growth", "cap"),
                },
            },
            "size?": {
                **_all(COUNT, "epochs", "evaluate_size"),
                "train_size?": or_null(COUNT),
                "network?": or_null(OBJECT),
            },
            "data?": {"name": TEXT},
            "hardware?": {"threads?": WIDTH},
        },
        "evaluation": {
            "step": COUNT,
            **_all(NUMBER, "train_seconds", "teleport_seconds"),
            **_all(LOSS_OR_NULL, "train_loss", "test_loss"),
            **_all(NUMBER_OR_NULL, "test_accuracy", "grad_norm?"),
        },
        "teleport": {
            f"{what}_{when}": NUMBER_OR_NULL
            for what in ("loss", "grad_norm", "held_out")
            for when in ("before", "after")
        },
    },
    "continual": {
        "config": {
            **_all(TEXT, "sequence", "split", "arm"),
            **_all(COUNT, "order", "seed"),
            "tasks": TASKS,
            "strategy": {"method": TEXT, "tau": NUMBER_OR_NULL},
        },
        "evaluation": {
            **_all(COUNT, "task", "task_step"),
            **_all(NUMBER, "train_seconds", "space_seconds"),
            **_all(NUMBERS, "losses", "accuracies"),
        },
    },
    "spectrum": {
        "config": {**_MOMENT, "optimizer": TEXT, "lr": NUMBER, "teleport_batch": COUNT},
        "spectrum": {"step": COUNT, "layer": TEXT, "d_in": WIDTH, "ranks": RANKS, "shares": SHARES},
    },
    "tau": {
        "config": {**_MOMENT, "trained": COUNT, "teleport_lr": NUMBER},
        "point": {
            "number": COUNT,
            **_all(NUMBER, "tau", "loss", "grad_norm"),
            "held_out": NUMBER_OR_NULL,
        },
    },
    "moves": {
        "config": {
            **_MOMENT,
            **_all(COUNT, "trained", "teleport_batch"),
            "growth": NUMBER,
            "evaluating": FLAG,
        },
        "move": {
            "steps": COUNT,
            **_all(FLAG, "searched", "rolled_back"),
            **_all(TEXT, "reason", "undone"),
            **_all(POSITIVE, "seconds", "gradient_seconds"),
            **_all(NUMBER, "tau", "tolerance", "loss_before", "grad_norm_before"),
            **_all(NUMBER_OR_NULL, "loss_after", "grad_norm_after"),
            **_all(NUMBER_OR_NULL, "held_out_before", "held_out_after"),
            "layers": LAYERS,
        },
    },
    "saving": {
        "config": {**_MOMENT, **_all(TEXT, "experiment", "optimizer")},
        "saving": {
            "arm": TEXT,
            "steps": COUNT,
            **_all(NUMBER, "stride", "stride_after", "growth"),
            "cost": POSITIVE,
        },
    },
    "words": {
        "config": {**_WAY, "choosing": FLAG},
        "evaluation": {
            **_SPENT,
            **_all(NUMBER, "alpha?", "learned", "recall", "cosine", "least_cosine"),
        },
    },
    "edit": {
        "config": _WAY,
        "evaluation": {
            **_SPENT,
            **_all(NUMBER, "efficacy", "paraphrases", "neighbours", "loss"),
        },
    },
    "leak": {
        "config": {**_MOMENT, "preset": TEXT},
        "share": {
            **_all(TEXT, "way", "optimizer"),
            "steps": COUNT,
            **_all(NUMBER, "moved", "inside", "drift"),
        },
    },
    "product": {
        "config": {**_MOMENT, "trained": COUNT},
        "product": {
            "layer": TEXT,
            "count": COUNT,
            "bias": FLAG,
            **_all(MATRIX, "rows", "weight", "outputs", "deltas", "gradient"),
        },
    },
    "connectivity": {
        "config": {
            **_MOMENT,
            **_all(TEXT, "experiment", "optimizer"),
            "points": POINTS,
            "trained": COUNT,
            "lr": NUMBER,
        },
        "teleport": {"to": TEXT, "grad_norm_before": POSITIVE, "grad_norm_after": NUMBER},
        "point": {"to": TEXT, **_all(NUMBER, "share", "train_loss", "test_loss")},
    },
    "sensitivity": {
        "config": {
            **_MOMENT,
            **_all(TEXT, "experiment", "optimizer"),
            "points": WIDTH,
            "place": NUMBERS,
            "values": {"n": WIDTH, "after": COUNT, **_all(NUMBER, "growth", "step", "open", "lr")},
        },
        "outcome": {
            "design": TEXT,
            "log_loss": NUMBER_OR_NULL,
            "growth": NUMBER,
            "rolled_back": FLAG,
            "status": STATUS,
        },
    },
    "bench": {
        "config": {
            **_all(TEXT, "benchmark", "preset", "device"),
            "hardware": {"threads": COUNT, "gpu": or_null(TEXT)},
            "load": or_null(NUMBERS),
            "size": {"small": FLAG, "base": _BASE},
        },
        "step": {
            **_TIMED,
            "operation": TEXT,
            **_all(NUMBER, "floor?", "floor_with_projection?"),
        },
        "basis": {**_TIMED, "operation": TEXT},
        "scaling": {**_TIMED, "method": TEXT, **_BASE},
        "layers": {**_TIMED, "operation": TEXT, "layers": COUNT},
        "deep": {**_TIMED, "operation": TEXT, **_all(WIDTH, "gradient", "tangent")},
        "memory": {
            **_all(TEXT, "network", "shape"),
            **_all(WIDTH, "model", "gradient", "tangent", "double_backward"),
            "grams": COUNT,
        },
        "rivals": _all(TEXT, "part", "way"),
        "same batch": {**_MOVED, "move": NUMBER, **_TIMES},
        "same budget": {
            **_MOVED,
            "steps": COUNT,
            **_all(POSITIVE, "seconds", "gradient_seconds", "gradients"),
        },
        "speed": {"activation": TEXT, **_TIMES},
        "end": {"status": TEXT},
    },
}

ROWS = {command: {"end": _END, **rows} for command, rows in _OWN.items()}
"""By command and type of row; measurements of benchmarks by what they are of."""

_MARKS = {"run": ("training", "settings"), "continual": ("sequence",), "bench": ("benchmark",)}


def made_by(config: dict[str, Any]) -> str:
    """The command whose record begins with this row; empty if it is none of ours.

    A sweep leaves what `teleport run` leaves.
    """
    if isinstance(config.get("figure"), str):
        return str(config["figure"])
    known = (command for command, marks in _MARKS.items() if any(key in config for key in marks))
    return next(known, "")


def check_row(path: Path, number: int, row: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a row in which a field is missing or of another kind; a record of others is theirs.

    RunError names record, line and field, what is there and what is expected.
    """
    command = made_by(config)
    known = ROWS.get(command, {})
    faults = (_fault(row, known.get(name, {})) for name in _names(command, row, config))
    fault = next(filter(None, faults), "")
    if not fault and command == "continual" and row["type"] == "evaluation":
        fault = _fault_of_tasks(row, config["tasks"])
    if fault:
        raise RunError(
            f"{path}, line {number} ({row['type']}): {fault}; move the file away, or make its "
            "record again"
        )


def _names(command: str, row: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Under which the fields of a row are found."""
    if command == "bench" and row["type"] == "measurement":
        yield config["benchmark"]
        yield str(row.get("part"))
    else:
        yield row["type"]


def _fault(values: dict[str, Any], fields: Fields, within: str = "") -> str:
    """The first field that is missing or of another kind; empty if there is none."""
    for name, kind in fields.items():
        key = name.removesuffix("?")
        if key not in values:
            if key == name:
                return f"{within}{key} is missing"
            continue
        value, where = values[key], within + key
        if isinstance(kind, Kind):
            if not kind.holds(value):
                return f"{where} is {_shown(value)}, expected {kind.what}"
        elif not isinstance(value, dict):
            return f"{where} is {_shown(value)}, expected {OBJECT.what}"
        elif fault := _fault(value, kind, f"{where}."):
            return fault
    return ""


def _fault_of_tasks(row: dict[str, Any], tasks: int) -> str:
    """An evaluation looks at the tasks up to its own."""
    count = row["task"] + 1
    if count > tasks:
        return f"task is {count - 1}, expected one of {tasks}, the first being 0"
    for name in ("losses", "accuracies"):
        if len(row[name]) != count:
            return f"{name} are {len(row[name])}, expected {count}, one for each task up to its own"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
