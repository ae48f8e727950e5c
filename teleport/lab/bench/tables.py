"""What the records of benchmarks say: tables with the budgets beside, curves with exponents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from teleport.errors import RunError
from teleport.lab.bench.benchmarks import BENCHMARKS
from teleport.lab.bench.null_spaces import AT_ONCE
from teleport.lab.bench.ranks import PURPOSES
from teleport.lab.bench.timing import Measurement, ScalingCurve, Spread, Timing, power_law
from teleport.lab.records.runs import read_rows
from teleport.lab.records.study import record_paths
from teleport.rivals.ways import OURS

BUDGETS = {
    ("MLP", "tangent step"): 1.0,
    ("CNN", "tangent step"): 2.0,
    ("transformer", "tangent step"): 2.0,
    ("MLP", "all bases"): 1.0,
    ("CNN", "all bases"): 2.0,
    ("transformer", "all bases"): 1.0,
    ("MLP", "default teleport, all in"): 6.0,
    ("CNN", "default teleport, all in"): 6.0,
    ("transformer", "default teleport, all in"): 6.0,
    ("forward pass", "tau 0.99"): 4.0,
    ("forward pass", "tau 1"): 6.0,
    ("plain step", "attach(every=10)"): 1.05,
    ("plain step", "lora_"): 1.0,
}
"""Gradients that an operation may cost; of ``keeping``, times what it is compared with."""

DEEP_BUDGET = 12.0
"""Gradients that a default teleport of a deep network may cost."""

MEMORY_BUDGET = 2.0
"""Peak of a default teleport over that of one gradient."""

SYMMETRY_BUDGET = 50.0
"""How many times faster than symmetry teleportation the tangent path is to be."""

CLAIMS = {"t": "linear", "d": "near constant", "n": "near constant", "l": "linear", "b": "linear"}
"""What the paper says of its method's runtime (section 4.4 and figure 5)."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as read from its record.

    Attributes:
        config: first line of the record.
        status: ``finished``, ``interrupted``, or ``unfinished`` without an end line.
    """

    name: str
    config: Measurement
    rows: list[Measurement]
    status: str

    @property
    def title(self) -> str:
        """What was measured, and on what."""
        threads, gpu = self.config["hardware"]["threads"], self.config["hardware"]["gpu"]
        where = f"{gpu}" if self.config["device"].startswith("cuda") else f"cpu, {threads} thread"
        where += "s" if threads != 1 and not self.config["device"].startswith("cuda") else ""
        load = self.config["load"]
        busy = "" if load is None else f", load {load[0]:.1f} when it began"
        ended = "" if self.status == "finished" else f", {self.status}"
        return f"{self.name}: preset {self.config['preset']}, {where}{busy}{ended}"

    def verdict(self, value: float, budget: float | None) -> tuple[str, str]:
        """What may be spent, and whether it was kept to; the small networks have no budgets."""
        if budget is None or self.config["size"]["small"]:
            return "", ""
        return f"<= {budget:g}", "met" if value <= budget else "missed"


@dataclass(frozen=True)
class Sheet:
    """A table of text."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""


def holds_benchmarks(folder: Path) -> bool:
    """Whether a folder has records of benchmarks."""
    return not BENCHMARKS.keys().isdisjoint(path.stem for path in record_paths(folder))


def read_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """The benchmarks whose records a folder holds, by name.

    Raises:
        RunError: if there is none, or a record is damaged or of something else.
    """
    found = {}
    paths = {path.stem: path for path in record_paths(folder)}
    for name in [name for name in BENCHMARKS if name in paths]:
        path = paths[name]
        config, *rest = read_rows(path)
        if config.get("benchmark") != name:
            raise RunError(f"{path} is not a record of the benchmark {name!r}")
        ends = [row["status"] for row in rest if row["type"] == "end"]
        rows = [row for row in rest if row["type"] == "measurement"]
        found[name] = Benchmark(name, config, rows, ends[-1] if ends else "unfinished")
    if not found:
        raise RunError(f"{folder} holds no benchmark; give a folder `teleport bench` has written")
    return found


def sheets(benchmark: Benchmark) -> list[Sheet]:
    """The tables of a benchmark."""
    return _SHEETS[benchmark.name](benchmark)


def timing(row: Measurement) -> Timing:
    """The repeats of a row."""
    return Timing(tuple(row["seconds"]), tuple(row["gradient_seconds"]))


def curves(benchmark: Benchmark) -> dict[str, tuple[str, dict[str, ScalingCurve]]]:
    """Per letter the paper's claim and one curve per method, from a ``scaling`` record."""
    panels = {}
    for letter, claim in CLAIMS.items():
        found = {method: _curve(benchmark, letter, method) for method in _methods(benchmark)}
        panels[letter] = (claim, {m: curve for m, curve in found.items() if curve.sizes})
    return panels


def _methods(benchmark: Benchmark) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in benchmark.rows))


def _curve(benchmark: Benchmark, letter: str, method: str) -> ScalingCurve:
    base = benchmark.config["size"]["base"]
    rows = [
        row
        for row in benchmark.rows
        if row["method"] == method and all(row[k] == base[k] for k in base if k != letter)
    ]
    rows.sort(key=lambda row: row[letter])
    sizes = tuple(float(row[letter]) for row in rows)
    seconds = tuple(Spread.of(row["seconds"]) for row in rows)
    exponent = power_law(sizes, [s.median for s in seconds]) if len(sizes) > 2 else None
    return ScalingCurve(sizes, seconds, exponent)


def _step(benchmark: Benchmark) -> list[Sheet]:
    def floor(row: Measurement) -> list[str]:
        text = "{floor:.2f} ({floor_with_projection:.2f})" if "floor" in row else ""
        return [text.format(**row)]

    columns = ("network", "what", *_COSTS, "floor")
    caption = (
        "Gradients: median ratio to one forward and backward pass run just before. ms: of CPU time "
        "with one thread. Floor: multiplications counted, in brackets with the projection."
    )
    return [Sheet(benchmark.title, columns, _by_network(benchmark, columns, floor), caption)]


def _basis(benchmark: Benchmark) -> list[Sheet]:
    def sizes(row: Measurement) -> list[str]:
        return [str(row.get(key, "")) for key in ("rows", "rank", "null_dim")]

    columns = ("network", "bases of", *_COSTS, "rows", "rank", "free")
    return [Sheet(benchmark.title, columns, _by_network(benchmark, columns, sizes))]


def _scaling(benchmark: Benchmark) -> list[Sheet]:
    panels, methods = curves(benchmark), _methods(benchmark)
    fitted = []
    for letter, (claim, found) in panels.items():
        exponents = [found[m].exponent if m in found else None for m in methods]
        fitted.append((letter, claim, *("-" if e is None else str(e) for e in exponents)))
    caption = (
        "Exponents of the median seconds with standard errors; each letter varied from "
        f"{_base_text(benchmark)}. The first layer never moves and the last is small: more layers "
        f"cost the same each, but the sum is not proportional to l.{_speed_ups(benchmark)}"
    )
    measured = [
        (f"{letter} = {size:g}", *(_seconds_at(found.get(m), size) for m in methods))
        for letter, (_, found) in panels.items()
        for size in sorted({s for curve in found.values() for s in curve.sizes})
    ]
    return [
        Sheet(benchmark.title, ("", "the paper", *methods), fitted, caption),
        Sheet("seconds of a teleport (median, quartiles)", ("", *methods), measured),
    ]


def _base_text(benchmark: Benchmark) -> str:
    return ", ".join(f"{key} = {value}" for key, value in benchmark.config["size"]["base"].items())


def _speed_ups(benchmark: Benchmark) -> str:
    """How many times the tangent path's time the others take, at the point all letters share."""
    base = benchmark.config["size"]["base"]
    there = [r for r in benchmark.rows if all(r[k] == base[k] for k in base)]
    seconds = {row["method"]: row["seconds"] for row in there}
    ours = seconds.pop("tangent", None)
    text = ""
    for method, slow in seconds.items() if ours else ():
        text += f" There {method} takes {_ratio(slow, ours).median:.3g} x the tangent path's time"
        text += f" (budget: >= {SYMMETRY_BUDGET:g})." if method.startswith("symmetry") else "."
    return text


def _memory(benchmark: Benchmark) -> list[Sheet]:
    parts = ("model", "gradient", "grams", "tangent", "double_backward")
    rows = []
    for row in benchmark.rows:
        sizes = [f"{row[part] / 2**20:.2f}" for part in parts]
        ours, other = (row[m] / row["gradient"] for m in parts[3:])
        budget = benchmark.verdict(ours, MEMORY_BUDGET)
        name = f"{row['network']} {row['shape']}"
        rows.append((name, *sizes, f"{ours:.2f}", f"{other:.2f}", *budget))
    sizes = ["model", "one gradient", "Grams", "teleport", "by double backward"]
    columns = ("network", *sizes, "gradients", "by double backward", "budget", "")
    caption = "MiB at the peak, beyond the model and its batch. Gradients: teleport / one gradient."
    return [Sheet(benchmark.title, columns, rows, caption)]


def _layers(benchmark: Benchmark) -> list[Sheet]:
    rows = []
    for depth in dict.fromkeys(row["layers"] for row in benchmark.rows):
        ways = {row["operation"]: row for row in benchmark.rows if row["layers"] == depth}
        alone, at_once = ways["sequential"], ways.get("parallel")
        cells = _spread_text(Spread.of(alone["seconds"])), f"{timing(alone).ratio.median:.2f}"
        parallel = "-", "-"
        if at_once:
            ratio = _ratio(at_once["seconds"], alone["seconds"])
            both = f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"
            parallel = _spread_text(Spread.of(at_once["seconds"])), both
        rows.append((str(depth), *cells, *parallel))
    columns = ("l", "sequential, s", "gradients", "parallel, s", "parallel / sequential")
    caption = "By the wall clock, so that a busy machine shows."
    return [Sheet(benchmark.title, columns, rows, caption)]


def _rivals(benchmark: Benchmark) -> list[Sheet]:
    base = benchmark.config["size"]["base"]
    rows = [
        (row["way"], *_moved_cells(row), f"{row['move']:.2f}", *_gradient_cells(row))
        for row in benchmark.rows
        if row["part"] == "same batch"
    ]
    columns = ("way", "growth", "drift", "held out", "move", "gradients", "quartiles (runs)")
    caption = (
        f"Perceptron 784-{base['d']}-{base['d']}-10 with LeakyReLU after 50 training steps, the "
        f"same {base['n']} images of MNIST for all. Growth: of the gradient norm; 1.5 is asked for "
        "where it can be. Drift: relative, of the loss of the batch and of 1,000 other images. "
        "Move: norm of the change of the weights. Gradients: median ratio of the seconds to one "
        "forward and backward pass run just before."
    )
    return [
        Sheet(f"{benchmark.title}; the same batch", columns, rows, caption),
        *_same_budget(benchmark),
        *_speeds(benchmark),
    ]


def _same_budget(benchmark: Benchmark) -> Iterator[Sheet]:
    """Medians over the rounds; older records have no such part."""
    found = [row for row in benchmark.rows if row["part"] == "same budget"]
    names = ("steps", "growth", "drift", "held_out_drift", "seconds")
    rows = []
    for way in dict.fromkeys(row["way"] for row in found):
        rounds = [row for row in found if row["way"] == way]
        middle = {name: Spread.of([float(row[name]) for row in rounds]).median for name in names}
        spent, one = ([row[name] for row in rounds] for name in ("seconds", "gradient_seconds"))
        cost = _ratio(spent, one)
        quartiles = f"{cost.low:.1f} - {cost.high:.1f} ({len(rounds)})"
        times = f"{1e3 * middle['seconds']:.0f}", f"{cost.median:.1f}", quartiles
        rows.append((way, f"{middle['steps']:g}", *_moved_cells(middle), *times))
    if rows:
        columns = ("way", "steps", "growth", "drift", "held out", "ms", "gradients")
        caption = (
            f"The same perceptron and images. Every way repeats its step, which asks for a growth "
            f"of 1.5 where it can, until the time of {found[0]['gradients']:g} gradients is spent; "
            "the last step is finished. Medians over the rounds. Steps: those kept. Growth and "
            "drift: of all of them together. Gradients: the time spent over that of one gradient."
        )
        title = "the same batch and the same time"
        yield Sheet(title, (*columns, "quartiles (rounds)"), rows, caption)


def _speeds(benchmark: Benchmark) -> Iterator[Sheet]:
    found = [row for row in benchmark.rows if row["part"] == "speed"]
    ours = {row["activation"]: row for row in found if row["way"] == OURS}
    rows = []
    for row in found:
        times = _ratio(row["seconds"], ours[row["activation"]]["seconds"]).median
        verdict = ("", "")
        if row["way"].startswith("symmetry") and not benchmark.config["size"]["small"]:
            verdict = f">= {SYMMETRY_BUDGET:g}", "met" if times >= SYMMETRY_BUDGET else "missed"
        rows.append(
            (row["activation"], row["way"], *_gradient_cells(row), f"{times:.2f}", *verdict)
        )
    if rows:
        columns = ("activation", "way", "gradients", "quartiles (runs)", "x null space")
        title = f"a teleport of fixed steps at {_base_text(benchmark)}"
        yield Sheet(title, (*columns, "budget", ""), rows, "Median ratios of the seconds.")


def _ranks(benchmark: Benchmark) -> list[Sheet]:
    rows = []
    for row in benchmark.rows:
        pairs = [f"{_mib(row['taken'][k])} ({_mib(row['predicted'][k])})" for k in PURPOSES]
        widths = "-".join(map(str, row["widths"]))
        shape = f"{widths}, n = {row['rows']}, τ = {row['tau']:g}"
        others = [f"{row['taken']['other'] / 1024:.1f}", str(row["exchanges"]), str(row["looks"])]
        rows.append((shape, str(row["ranks"]), *pairs, *others, _mib(row["peak"])))
    columns = ("network", "ranks", *PURPOSES, "other, KiB", "exchanges", "looks", "peak")
    caption = (
        "MiB that the last rank takes in during one default teleport, in brackets by formula. "
        "n: in all ranks together. Looks: at a gradient norm. Peak: of tensors on one rank."
    )
    return [Sheet(benchmark.title, columns, rows, caption)]


def _deep(benchmark: Benchmark) -> list[Sheet]:
    rows = []
    for row in benchmark.rows:
        costs = *_gradient_cells(row), *benchmark.verdict(timing(row).ratio.median, DEEP_BUDGET)
        seconds = (Spread.of(row[key]).median for key in ("gradient_seconds", "seconds"))
        peaks = (f"{row[key] / 2**20:.4g}" for key in ("gradient", "tangent"))
        memory = f"{row['tangent'] / row['gradient']:.2f}"
        name = f"{row['network']} {row['shape']}"
        rows.append((name, *costs, *(f"{s:.3g}" for s in seconds), *peaks, memory))
    columns = ("network", "gradients", "quartiles (runs)", "budget", "")
    sizes = [f"{what}, {unit}" for unit in ("s", "MiB") for what in ("a gradient", "a teleport")]
    caption = (
        "A default teleport, all in: median ratio to one forward and backward pass run just "
        "before, seconds, and MiB at the peak beyond the model and its batch."
    )
    return [Sheet(benchmark.title, (*columns, *sizes, "memory"), rows, caption)]


def _keeping(benchmark: Benchmark) -> list[Sheet]:
    rows = [(row["network"], *_cost_cells(benchmark, row)) for row in benchmark.rows]
    columns = ("against", "what", "times", *_COSTS[1:])
    shape = benchmark.rows[0]["shape"] if benchmark.rows else ""
    caption = (
        f"{shape}; weights are random. Times: median ratio to the forward pass of the same "
        f"sentences, or to {AT_ONCE} plain steps. ms: of CPU time with one thread."
    )
    return [Sheet(benchmark.title, columns, rows, caption)]


_SHEETS: dict[str, Callable[[Benchmark], list[Sheet]]] = {
    "step": _step,
    "basis": _basis,
    "scaling": _scaling,
    "memory": _memory,
    "layers": _layers,
    "rivals": _rivals,
    "ranks": _ranks,
    "deep": _deep,
    "keeping": _keeping,
}

_COSTS = ("gradients", "quartiles (runs)", "ms", "budget", "")


def _cost_cells(benchmark: Benchmark, row: Measurement) -> tuple[str, ...]:
    """An operation and its `_COSTS`."""
    budget = BUDGETS.get((row["network"], row["operation"]))
    verdict = benchmark.verdict(timing(row).ratio.median, budget)
    ms = f"{1e3 * Spread.of(row['seconds']).median:.1f}"
    return row["operation"], *_gradient_cells(row), ms, *verdict


def _by_network(
    benchmark: Benchmark, columns: Sequence[str], more: Callable[[Measurement], list[str]]
) -> list[tuple[str, ...]]:
    """A line for the gradient of every network, and one for each operation, with what is more."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row["network"] for row in benchmark.rows):
        group = [row for row in benchmark.rows if row["network"] == name]
        seconds = Spread.of([s for row in group for s in row["gradient_seconds"]]).median
        line = (f"{name} {group[0]['shape']}", "one gradient", "1", "", f"{1e3 * seconds:.1f}")
        rows.append((*line, *[""] * (len(columns) - len(line))))
        rows += [("", *_cost_cells(benchmark, row), *more(row)) for row in group]
    return rows


def _moved_cells(row: Measurement) -> tuple[str, ...]:
    return f"{row['growth']:.3f}", f"{row['drift']:.1e}", f"{row['held_out_drift']:.1e}"


def _gradient_cells(row: Measurement) -> tuple[str, str]:
    ratio = timing(row).ratio
    return f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f} ({len(row['seconds'])})"


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> Spread:
    """Of repeats that were made side by side."""
    return Timing(tuple(seconds), tuple(others)).ratio


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g}"


def _seconds_at(curve: ScalingCurve | None, size: float) -> str:
    if curve is None or size not in curve.sizes:
        return "not run: too slow before"
    return _spread_text(curve.seconds[curve.sizes.index(size)])


def _spread_text(seconds: Spread) -> str:
    return f"{seconds.median:.4g} ({seconds.low:.4g} - {seconds.high:.4g})"
