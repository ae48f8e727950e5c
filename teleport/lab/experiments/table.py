"""The named experiments: a table in TOML, read and checked to the last key.

``table.toml`` beside this module is the table; its head explains the keys. Every value is
marked `paper` or `ours`. A table of one's own is used as ``file.toml:name``.

The checks are by hand. Pydantic, tried on presets and tuning, names no known keys for an unknown
one and takes integers that TOML does not have; with what mends that it would save thirty lines.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from teleport.errors import RunError
from teleport.lab.experiments.entry import (
    INITIALISATION,
    NAME,
    SIZES,
    Experiment,
    PaperTeleport,
    Preset,
    Tuning,
    one_of,
)
from teleport.lab.records.schema import COUNT, POSITIVE, WIDTH, Kind
from teleport.runtime.toml import tomllib

MARKS = ("paper", "ours")
TOO_LONG = "a chain of `like`, or of tables in tables, is too long to follow; shorten it"

_PRESET = dict.fromkeys(("epochs", "evaluate_every", "evaluate_size", "train_size"), WIDTH)
_TUNING = {
    "on": NAME,
    **dict.fromkeys(("low", "tuned", "gain_lr", "head_gain"), POSITIVE),
    "init": INITIALISATION,
}
_TELEPORT = {"lr": POSITIVE, "cap": POSITIVE, "warmup_steps": COUNT, "n": WIDTH, "held_out": WIDTH}


def read_experiments(path: Path) -> dict[str, Experiment]:
    """Read a table of experiments.

    Raises:
        RunError: if the file cannot be read or is not TOML (with the line), or if a key is unknown,
            missing or has a bad value (with the key).
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read the experiments in {path}: {error}") from error
    except ValueError as error:  # TOMLDecodeError, or an integer longer than Python reads
        raise RunError(f"{path} is not TOML: {error}") from error
    except RecursionError as error:
        raise RunError(f"{path}: {TOO_LONG}") from error
    try:
        _check_integers("", table)
        entries = {name: _inherited(name, table, ()) for name in table}
        found = {name: _experiment(name, entry) for name, entry in entries.items()}
        return {name: _with_lent_tuning(one, found) for name, one in found.items()}
    except RunError as error:
        raise RunError(f"{path}: {error}") from error
    except RecursionError as error:
        raise RunError(f"{path}: {TOO_LONG}") from error


def _check_integers(where: str, value: Any) -> None:
    """Refuse integers that TOML does not have: Python reads them, but cannot print the longest."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RunError(f"{where}: must fit in 64 bits, got an integer of {value.bit_length()} bits")
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(inner, dict):
        for key, item in inner.items():
            _check_integers(f"{where}.{key}" if where else key, item)


def names_in(name: str) -> list[str]:
    """The experiments that a name stands for: all of ``file.toml``, else itself.

    RunError if the file cannot be read, is not a table of experiments, or is empty.
    """
    if not name.endswith(".toml"):
        return [name]
    found = [f"{name}:{own}" for own in _read_once(Path(name).resolve())]
    if not found:
        raise RunError(f"{name} holds no experiments")
    return found


def find_experiment(name: str) -> Experiment:
    """The experiment of this name, or of ``file.toml:name``.

    ValueError for an unknown name, with the known ones, and for a file without a name; RunError if
    the file cannot be read or is not a table of experiments.
    """
    if name.endswith(".toml"):
        choice = " or ".join(names_in(name))
        raise ValueError(f"{name} is a table of experiments; give one of them: {choice}")
    if name in _GIVEN:
        return _GIVEN[name]
    path, colon, own = name.rpartition(".toml:")
    known = _read_once(Path(f"{path}.toml").resolve()) if colon else EXPERIMENTS
    return one_of("experiment", own if colon else name, known)


_GIVEN: dict[str, Experiment] = {}


def give(name: str, experiment: Experiment) -> None:
    """Let a name stand for an experiment in this process, whatever a file of that name says here.

    Another process, or another machine, that was sent a cell needs no table of its own.
    """
    _GIVEN[name] = experiment


@cache
def _read_once(path: Path) -> dict[str, Experiment]:
    """One reading serves a whole process, so that a table that is edited meanwhile harms no run."""
    return read_experiments(path)


def _inherited(name: str, table: dict[str, Any], children: tuple[str, ...]) -> dict[str, Any]:
    """The entry of an experiment over that of the one it is like."""
    entry = table.get(name)
    if name in children:
        raise RunError(f"{name}.like: goes in a circle, {' -> '.join((*children, name))}")
    if not isinstance(entry, dict):
        key = f"{children[-1]}.like" if children else name
        raise RunError(f"{key}: expected the name or the table of an experiment, got {entry!r}")
    entry = _signed(name, entry)
    parent = entry.pop("like", None)
    if parent is None:
        return entry
    return _over(_inherited(str(parent), table, (*children, name)), entry)


def _signed(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A copy whose learning rates say for which experiment they were tuned."""
    tuning = entry.get("tuning")
    if not isinstance(tuning, dict):
        return dict(entry)
    signed = {
        optimizer: {mark: {"on": name, **rates} for mark, rates in value.items()}
        if _is_marked(value) and all(isinstance(rates, dict) for rates in value.values())
        else value
        for optimizer, value in tuning.items()
    }
    return {**entry, "tuning": signed}


def _with_lent_tuning(one: Experiment, known: dict[str, Experiment]) -> Experiment:
    """With the learning rates of the experiment that lends them, where it has none of its own."""
    if one.tuning_of in (None, one.name):  # itself where an experiment is like the one it lends to
        return one
    if one.tuning_of not in known:
        raise RunError(
            f"{one.name}.tuning_of: must be one of {', '.join(known)}; got {one.tuning_of!r}"
        )
    return replace(one, tuning={**known[one.tuning_of].tuning, **one.tuning})


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge tables key by key; a marked value, and a network of another kind, replaces all below.

    The sizes of one kind of network mean nothing to another.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        whole = key == "network" and isinstance(value, dict) and "kind" in value
        if isinstance(old, dict) and isinstance(value, dict) and not (_is_marked(value) or whole):
            value = _over(old, value)
        merged[key] = value
    return merged


def _is_marked(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in MARKS


def _experiment(name: str, entry: dict[str, Any]) -> Experiment:
    marks: dict[str, str] = {}

    def marked(key: str, value: Any) -> Any:
        if not _is_marked(value):
            raise RunError(f"{name}.{key}: mark the value, `.paper` or `.ours`; got {value!r}")
        ((mark, content),) = value.items()
        marks[key] = mark
        return content

    def table(key: str) -> dict[str, Any]:
        value = entry.get(key, {})
        if not isinstance(value, dict):
            raise RunError(f"{name}.{key}: expected a table, got {value!r}")
        return {inner: marked(f"{key}.{inner}", item) for inner, item in value.items()}

    def checked(key: str, kind: Kind) -> Any:
        return _checked(f"{name}.{key}", marked(key, entry[key]), kind)

    known = {f.name for f in fields(Experiment)} - {"name", "marks"}
    _keys(name, entry, known, optional={"tuning", "tuning_of"})
    network = table("network")
    sizes = _sizes(f"{name}.network", network)
    return Experiment(
        name=name,
        title=_checked(f"{name}.title", entry["title"], NAME),
        data=checked("data", NAME),
        network=network,
        batch_size=checked("batch_size", WIDTH),
        teleport=PaperTeleport(**_values(f"{name}.teleport", table("teleport"), _TELEPORT)),
        presets={
            key: _preset(f"{name}.presets.{key}", value, sizes)
            for key, value in table("presets").items()
        },
        tuning={
            key: Tuning(**_values(f"{name}.tuning.{key}", value, _TUNING))
            for key, value in table("tuning").items()
        },
        tuning_of=checked("tuning_of", NAME) if "tuning_of" in entry else None,
        marks=marks,
    )


def _sizes(where: str, network: dict[str, Any]) -> dict[str, Kind]:
    kind = network.get("kind")
    if not isinstance(kind, str) or kind not in SIZES:
        raise RunError(f"{where}.kind: must be one of {', '.join(SIZES)}; got {kind!r}")
    sizes = SIZES[kind]
    given = {key: value for key, value in network.items() if key != "kind"}
    _values(where, given, sizes)
    return sizes


def _preset(where: str, value: Any, sizes: dict[str, Kind]) -> Preset:
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected a table, got {value!r}")
    network = value.get("network", {})
    rest = {key: item for key, item in value.items() if key != "network"}
    _values(f"{where}.network", network, sizes, optional=set(sizes))
    return Preset(**_values(where, rest, _PRESET, optional={"train_size"}), network=network)


def _values(
    where: str, given: Any, checks: Mapping[str, Kind], optional: AbstractSet[str] = frozenset()
) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RunError(f"{where}: expected a table, got {given!r}")
    _keys(where, given, set(checks), optional)
    return {key: _checked(f"{where}.{key}", item, checks[key]) for key, item in given.items()}


def _keys(
    where: str, given: dict[str, Any], known: AbstractSet[str], optional: AbstractSet[str]
) -> None:
    for key in given:
        if key not in known:
            raise RunError(f"{where}.{key}: unknown key; known are {', '.join(sorted(known))}")
    for key in sorted(known - optional):
        if key not in given:
            raise RunError(f"{where}.{key}: missing")


def _checked(where: str, value: Any, check: Kind) -> Any:
    if not check.holds(value):
        raise RunError(f"{where}: must be {check.what}, got {value!r}")
    return value


def _own() -> dict[str, Experiment]:
    with resources.as_file(resources.files("teleport.lab.experiments") / "table.toml") as path:
        return read_experiments(path)


EXPERIMENTS: dict[str, Experiment] = _own()
