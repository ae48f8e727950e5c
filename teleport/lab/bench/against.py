"""Two records of the same benchmarks: what became dearer, as ratios of ratios.

Seconds of two days, or of two machines, cannot be compared. Gradients can: each operation was timed
beside one gradient in the same process. What is left of the machine are a few tens of percent, so
only a factor of `TOO_MUCH` is a fault.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from teleport.errors import RunError
from teleport.lab.bench.tables import Benchmark, Sheet, timing

TOO_MUCH = 2.0
"""From this factor on an operation has become dearer for another reason than the machine."""


@dataclass(frozen=True)
class Change:
    """What one operation costs now and cost before, in gradients.

    Attributes:
        what: benchmark, network, operation.
        before, now: medians; of memory, peaks.
    """

    what: tuple[str, str, str]
    before: float
    now: float

    @property
    def factor(self) -> float:
        """Now over before; above 1 is dearer."""
        return self.now / self.before


def require_preset(preset: str, before: Mapping[str, Benchmark]) -> None:
    """Raise RunError for a record of another preset, before minutes are spent on measuring."""
    if (known := {b.config["preset"] for b in before.values()}) != {preset}:
        raise RunError(
            f"the records are of other presets: {preset} now, {_named(known)} before. Run "
            "`teleport bench` with the preset of the record to compare with"
        )


def changes(now: Mapping[str, Benchmark], before: Mapping[str, Benchmark]) -> list[Change]:
    """What both records hold, largest factor first; RunError if they have nothing in common."""
    new, old = ({k: v for b in found.values() for k, v in _costs(b)} for found in (now, before))
    if not (both := new.keys() & old.keys()):
        raise RunError(
            f"nothing to compare: {_named(now)} was measured now, the record holds {_named(before)}"
        )
    found = [Change(what, old[what], new[what]) for what in both]
    return sorted(found, key=lambda change: (-change.factor, change.what))


def sheet(found: list[Change]) -> Sheet:
    """The changes as a table."""
    rows = [
        (*c.what, f"{c.before:.2f}", f"{c.now:.2f}", f"{c.factor:.2f}", _verdict(c)) for c in found
    ]
    columns = ("benchmark", "network", "operation", "before", "now", "factor", "")
    caption = f"In gradients of the same process. Dearer: by a factor of {TOO_MUCH:g} or more."
    return Sheet("against the record", columns, rows, caption)


def _costs(benchmark: Benchmark) -> Iterator[tuple[tuple[str, str, str], float]]:
    """The cost of each operation that a record holds, in gradients."""
    for row in benchmark.rows:
        where = " ".join(f"{row.get(key, '')}" for key in ("network", "shape", "layers")).strip()
        if benchmark.name == "memory":
            yield ("memory", where, "peak"), row["tangent"] / row["gradient"]
        elif "operation" in row:
            yield (benchmark.name, where, row["operation"]), timing(row).ratio.median


def _verdict(change: Change) -> str:
    return "dearer" if change.factor >= TOO_MUCH else ""


def _named(names: Mapping[str, Benchmark] | set[str]) -> str:
    return ", ".join(sorted(names))
