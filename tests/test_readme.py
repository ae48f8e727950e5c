"""What the README and the pages of tables and use say is what the records and the library say.

``python tests/test_readme.py`` prints the generated parts.
"""

import base64
import contextlib
import io
import json
import re
from functools import cache
from math import expm1, isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import teleport
from teleport import data
from teleport.lab.analysis import counts, outcomes, teleports
from teleport.lab.analysis.outcomes import markdown
from teleport.lab.bench.tables import holds_benchmarks, read_benchmarks, timing
from teleport.lab.bench.timing import Spread
from teleport.lab.experiments.models import mlp
from teleport.lab.experiments.optimizers import OPTIMIZERS
from teleport.lab.experiments.table import EXPERIMENTS
from teleport.lab.keeping.measures import accuracy_matrix, average_accuracy, backward_transfer
from teleport.lab.keeping.report import forgetting_rows
from teleport.lab.paper.savings import read_savings
from teleport.lab.records.compare import ArmSummary, Comparison, summarise
from teleport.lab.records.runs import by_arm, read_runs
from teleport.lab.records.study import record_folders
from teleport.rivals.ways import OURS
from tests.support.words import WORDS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "chapters" / "results"
PAGES = ("README.md", "chapters/results.md", "chapters/use.md", "chapters/commands.md")
README, TABLES, USE, COMMANDS = PAGES
SEQUENCES = ("mnist-fashion", "mnist-fashion-tau", "permuted-mnist")
HEAD = [
    "| arm | final train loss | final test loss | steps | seconds | log loss |",
    "|---|---|---|---|---|---|",
]


@cache
def matrix() -> list[outcomes.FolderOutcome]:
    return outcomes.blocks(RESULTS / "matrix")


def result_lines() -> list[str]:
    once = [result_line(s) for s in summarise(read_runs(RESULTS / "matrix" / "mnist-mlp" / "sgd"))]
    paper = summarise(read_runs(RESULTS / "matrix" / "mnist-mlp" / "sgd-paper"))
    schedule = [result_line(s, ", paper's schedule") for s in paper if s.to_own is not None]
    return [*HEAD, *once[:2], schedule[0], *once[2:4], schedule[1], *once[4:]]


def result_line(summary: ArmSummary, note: str = "") -> str:
    losses = f"{summary.train_loss:.4f} | {summary.test_loss:.4f}"
    return f"| {summary.arm}{note} | {losses} | {comparison(summary.to_own)} |"


def comparison(found: Comparison | None) -> str:
    if found is None:
        return "1 | 1 | 0"
    steps, seconds = ("-" if isnan(r) else f"× {r:.2f}" for r in (found.steps, found.seconds))
    return f"{steps} | {seconds} | {found.log_loss:+.3f} ± {found.log_loss_spread:.3f}"


COSTS = (
    ("step", "tangent step", "one step's direction, ours"),
    ("step", "double backward direction", "the same by double backward, the paper's way"),
    ("basis", "all bases", "bases of one batch"),
    ("step", "one look of the line search", "one look of the line search"),
    ("step", "default teleport, all in", "one default teleport, everything in"),
)


def cost_lines() -> list[str]:
    """What a teleport costs in gradients, from the benchmarks' records; and did at first."""
    now, then = (read_benchmarks(RESULTS / "bench" / name) for name in ("after", "before"))
    networks = ("MLP", "CNN", "transformer")
    lines = ["| gradients | MLP | CNN | transformer |", "|---|---|---|---|"]
    for benchmark, operation, name in COSTS:
        cells = []
        for network in networks:
            medians = [
                timing(row).ratio.median
                for found in (now, then)
                for row in found[benchmark].rows
                if (row["network"], row["operation"]) == (network, operation)
            ]
            cells.append("{:.2f} ({:.2f})".format(*medians))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    both = read_benchmarks(RESULTS / "bench" / "two-threads")["step"].rows
    whole = [timing(row).ratio.median for row in both if row["operation"] == COSTS[-1][1]]
    lines.append(f"| the same on two threads | {' | '.join(f'{cost:.2f}' for cost in whole)} |")
    pairs = zip(now["memory"].rows, then["memory"].rows, strict=True)
    peaks = [[row["tangent"] / row["gradient"] for row in rows] for rows in pairs]
    cells = " | ".join("{:.2f} ({:.2f})".format(*peak) for peak in peaks)
    return [*lines, f"| memory at the peak, in that of a gradient | {cells} |"]


def tool_lines() -> list[str]:
    """What the null space as a tool costs, from the benchmark's record."""
    names = {"forward pass": "`null_space` at {}", "plain step": "a step with `{}`"}
    lines = ["| what | against | times |", "|---|---|---|"]
    for row in read_benchmarks(RESULTS / "bench" / "keeping")["keeping"].rows:
        what = names[row["network"]].format(row["operation"].replace("tau ", "τ = "))
        lines.append(f"| {what} | {row['network']} | {timing(row).ratio.median:.2f} |")
    return lines


def sequence_lines(name: str) -> list[str]:
    """The columns of a sequence's table that fit on a page."""
    rows = forgetting_rows(read_runs(RESULTS / "keeping" / name))
    left_out = {"final new loss", "seconds per step / plain"}
    if name == "permuted-mnist":
        left_out |= {"old accuracy", "new accuracy"}
    else:
        left_out |= {"ACC", "BWT"}
    kept = [i for i, title in enumerate(rows[0]) if title not in left_out]
    return markdown([[row[i] for i in kept] for row in rows])


def rival_lines() -> list[str]:
    """The rivals on the same batch and in training, and the speed ratio, from the records."""
    measured = read_benchmarks(RESULTS / "bench" / "rivals")["rivals"].rows
    arms = {s.arm: s.to_own for s in summarise(read_runs(RESULTS / "rivals" / "mnist-sample"))}
    low, tuned = [arm for arm, against in arms.items() if against is None][:2]
    titles = [f"{what}, {rate}" for rate in (low, tuned) for what in ("log loss", "seconds")]
    lines = [
        f"| way | growth | drift | held out | gradients | {' | '.join(titles)} |",
        "|---" * 9 + "|",
    ]
    for row in measured:
        arm = "teleport" if row["way"] == "null space" else row["way"]
        if row["part"] == "same batch" and f"{low} + {arm}" in arms:
            drifts = f"{row['drift']:.0e} | {row['held_out_drift']:.0e}"
            found = [arms[f"{rate} + {arm}"] for rate in (low, tuned)]
            gains = " | ".join(f"{log_loss(one)} | {in_seconds(one)}" for one in found)
            cost = f"{timing(row).ratio.median:.1f}"
            lines.append(f"| {row['way']} | {row['growth']:.2f} | {drifts} | {cost} | {gains} |")
    return [*lines, "", *speed_lines(measured)]


def matrix_lines() -> list[str]:
    """Every data set with every optimizer at the low and tuned rate, and counts of them all."""
    found = [
        block
        for block in matrix()
        if block.folder.parts in {(block.experiment, o) for o in OPTIMIZERS}
    ]
    optimizers = [name for name in OPTIMIZERS if any(b.optimizer == name for b in found)]
    lines = [
        f"| log loss, low / tuned rate | {' | '.join(optimizers)} |",
        "|---" * (len(optimizers) + 1) + "|",
    ]
    for experiment in dict.fromkeys(block.experiment for block in found):
        cells = []
        for name in optimizers:
            pair = [b for b in found if (b.experiment, b.optimizer) == (experiment, name)]
            gaps = [counts.gap(arm.to_own) for b in pair for arm in counts.teleporting(b)]
            short = [gap.split(" ±")[0] + "**" * ("**" in gap) for gap in gaps]
            cells.append(" / ".join(short) or "-")
        lines.append(f"| `{experiment}` | {' | '.join(cells)} |")
    lines += ["", "| against | rate | comparisons | resolved |", "|---|---|---|---|"]
    for rate, places in counts.low_and_tuned(found).items():
        for against in ("to_own", "to_best"):
            answers = [getattr(arm, against) for _, arm in places]
            name = "the same rate" if against == "to_own" else "the best baseline"
            lines.append(f"| {name} | {rate} | {len(answers)} | {counts.count(answers)} |")
    return lines


def log_loss(found: Comparison | None) -> str:
    assert found is not None
    return f"{found.log_loss:+.3f} ± {found.log_loss_spread:.3f}"


def in_seconds(found: Comparison | None) -> str:
    assert found is not None
    return "-" if isnan(found.seconds) else f"× {found.seconds:.2f}"


def speed_lines(measured: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in measured if row.get("activation") == "LeakyReLU"]
    own = next(row["seconds"] for row in rows if row["way"] == OURS)
    lines = ["| eight fixed steps | gradients | × null space |", "|---|---|---|"]
    for row in rows:
        ratio = Spread.of([theirs / ours for theirs, ours in zip(row["seconds"], own, strict=True)])
        lines.append(f"| {row['way']} | {timing(row).ratio.median:.0f} | {ratio.median:.1f} |")
    return lines


NAMES = {
    "etth1": "ETTh1",
    "exchange-rate": "the exchange rates",
    "smnist-rows": "the rows of MNIST",
}
NEITHER = ("mnist-mlp", "fashion-mlp", "mamba-", "ttt-")
"""How experiments begin that train no convolutional network and no transformer."""


def word(number: int) -> str:
    return ("no", *WORDS[1:])[number] if number < len(WORDS) else str(number)


def percents(lower: list[Comparison]) -> str:
    """By how much a loss is lower in the least and in the most of some comparisons."""
    found = sorted({round(-200 * expm1(one.log_loss)) / 2 for one in lower}) or [0.0]
    if found == [0.5]:
        return "half a percent"
    ends = dict.fromkeys(word(round(end)) for end in (found[0], found[-1]))
    return f"{' to '.join(ends)} percent"


def resolved(places: list[counts.Place], sign: int) -> list[tuple[str, Comparison]]:
    """Where the seeds resolve a lower (-1) or a higher loss (1), by experiment and optimizer."""
    clear = [(b, a.to_own) for b, a in places if a.to_own and a.to_own.resolved]
    named = [(f"{NAMES.get(b.experiment, b.experiment)} with {b.optimizer}", c) for b, c in clear]
    return [(name, one) for name, one in named if sign * one.log_loss > 0]


def matrix_sentences() -> list[tuple[str, str]]:
    """What pages must say of the arms in the matrix: page and words."""
    default = [b for b in matrix() if b.folder.parts in {(b.experiment, o) for o in OPTIMIZERS}]
    low, tuned, gain = counts.low_and_tuned(default).values()
    flat = [one for name, one in resolved(low, -1) if name.startswith(NEITHER)]
    others = [place for place in low if not place[0].experiment.startswith(NEITHER)]
    won = resolved(others, -1)
    by = f"by {percents([one for _, one in won])}"
    names = " and ".join(name for name, _ in won)
    series = [
        arm.to_own
        for block, arm in (*tuned, *gain)
        if block.folder.parts in (("etth1", "sgd"), ("exchange-rate", "sgd")) and arm.to_own
    ]
    gone = word(sum(one.diverged for one in series))
    of = f"Of {len(others)} comparisons with convolutional networks and transformers"
    losses = " and ".join(name.split(" with ")[0] for name, _ in resolved(tuned, 1))
    (treebank,) = (b for b in default if b.folder.parts == ("ptb-words", "sgd"))
    ran = [by_arm(treebank.runs)[arm.arm] for arm in counts.teleporting(treebank)]
    ends = [word(sum(map(teleports.worse_than_the_start, runs))) for runs in ran]
    diverged = sum(arm.to_own is not None and arm.to_own.diverged > 0 for _, arm in gain)
    clear = len(resolved(gain, -1) + resolved(gain, 1))
    apart = (*NEITHER, "mnist-sample", "narrow-mlp", "smnist/")  # by both rules, or not in question
    older = [name for name in teleports.by_the_usual_cut(default) if not name.startswith(apart)]
    cut = " and ".join(dict.fromkeys(f"`{name.split('/')[0]}`" for name in older))
    old = f"are the teleports of {cut}, and" if cut else "are all by the present rank rule"
    paper = [b.experiment for b in matrix() if b.folder.name in ("sgd-paper", "adam-paper")]
    tried, both = len(set(paper)), sum(paper.count(name) == 2 for name in set(paper))
    cells = f"Of the {len(gain)} cells of the table above that have this arm, with three seeds each"
    return [
        (README, f"lowers the loss of most perceptrons by {percents(flat)}"),
        (README, f"{of} one teleport lowers the loss in {word(len(won))}, {by}"),
        (README, f"{gone} of {word(sum(one.seeds for one in series))} teleported runs diverge"),
        (TABLES, f"by {percents(flat)}, and at best saves a seventh of the steps"),
        (TABLES, f"{of} it lowers {word(len(won))}, {names}, {by}"),
        (TABLES, f"At the tuned rate {word(len(resolved(tuned, -1)))} gains are resolved"),
        (TABLES, f"and {word(len(resolved(tuned, 1)))} losses, both with Adagrad, on {losses}"),
        (TABLES, f"explodes after it in {ends[0]} run of three at the low rate"),
        (TABLES, f"at the low rate, in {ends[1]} of three at the tuned rate"),
        (TABLES, old),
        (
            TABLES,
            f"was tried on {word(tried)} of these data sets with SGD or Adam, on {word(both)} ",
        ),
        (TABLES, f"{cells}, {clear or 'none'} is resolved, and {word(diverged)} diverge"),
    ]


def other_sentences() -> list[tuple[str, str]]:
    """The same of the teleports from the tuned gain, and of Gradient Projection Memory."""
    texts, lower = [], []
    arms = [summarise(read_runs(RESULTS / "gain" / f"growth-{growth}")) for growth in ("1.5", "2")]
    for rate in ("lr 0.1", "lr 0.2"):
        name = f"{rate}, he init head x3 + teleport"
        pair = [arm.to_own for found in arms for arm in found if arm.arm == name and arm.to_own]
        lower += pair
        texts.append(" and ".join(log_loss(one).lstrip("-") for one in pair))
    ends = gpm_ends("gpm-mnist") | gpm_ends("gpm-variants")
    plain, gpm, both = ends["plain"], ends["gpm"], ends["two-sided"]
    alone = gpm_ends("gpm-quiet")["two-sided"]
    return [
        (README, f"lowers the loss of a perceptron by {percents(lower)} (eight seeds)"),
        (TABLES, f"by {texts[0]} at rate 0.1, and by {texts[1]} at the tuned 0.2, all resolved"),
        (TABLES, f"(ACC) of {plain[0]} and a backward transfer (BWT) of {plain[1]}"),
        (TABLES, f"by this library with {gpm[0]} and {gpm[1]}"),
        (TABLES, f"(`two-sided`, chapter 12) with {both[0]} and {both[1]}"),
        (TABLES, f"took {gpm[2]} times plain's seconds a step, on a machine"),
        (TABLES, f"both sides {alone[2]}, bases included, on one that did not (three other"),
        (TABLES, "`keeping/gpm-quiet`: ACC {}, BWT {})".format(*alone)),
        (TABLES, "as good (ACC {}, BWT {})".format(*ends["gpm-lazy"])),
        (TABLES, "end lower ({}, {}), and so".format(*ends["gpm-growing"])),
        (TABLES, "does Adam ({}, {})".format(*ends["gpm-adam"])),
    ]


def gpm_ends(name: str) -> dict[str, list[str]]:
    """Of every method on ten permutations: ACC, BWT, and its seconds a step against plain's."""
    runs = read_runs(RESULTS / "keeping" / name)
    ends: dict[str, list[str]] = {}
    for of_arm in by_arm(runs).values():
        matrices = [accuracy_matrix(run) for run in of_arm]
        for measure in (average_accuracy, backward_transfer):
            values = [measure(matrix) for matrix in matrices]
            said = f"{mean(values):.3f} ± {stdev(values):.3f}".replace("0.", ".")
            ends.setdefault(of_arm[0].config["strategy"]["method"], []).append(said)
    head, *rows = forgetting_rows(runs)
    for row in rows:
        seconds = row[head.index("seconds per step / plain")].replace(" 0.", " .")
        ends[row[0].split()[0].strip(",")].append(seconds)
    return ends


def example_output(change: tuple[str, str] = ("", "")) -> list[float]:
    """The accuracies that the example of the null space prints."""
    (code,) = re.findall(r"<!-- example: .*?```python\n(.*?)```", page(USE), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace(*change), {})
    return [float(line.split()[1]) for line in printed.getvalue().splitlines()]


def example_report() -> str:
    """The report of the README's five lines, for the paper's network at its initialisation."""
    torch.manual_seed(0)
    sample = data.load("mnist-sample")
    model: nn.Module = mlp(sample.width, sample.classes)
    inputs, targets = sample.train_inputs[:200], sample.train_targets[:200]
    teleporter = teleport.Teleporter(model, growth=1.5)
    report = teleporter.step(lambda: cross_entropy(model(inputs), targets))
    return str(report)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def between(start: str, end: str, name: str = TABLES) -> list[str]:
    found = re.search(rf"<!-- {start}.*?-->\n(.*?)<!-- {end}", page(name), re.DOTALL)
    assert found is not None
    return [line for line in found.group(1).splitlines() if line]


def test_the_results_are_those_of_the_records() -> None:
    assert between("results", "end of results") == result_lines()


def test_the_table_of_all_experiments_is_that_of_the_records() -> None:
    assert between("matrix", "end of matrix") == [line for line in matrix_lines() if line]


def test_the_costs_are_those_of_the_records() -> None:
    assert between("costs", "end of costs") == cost_lines()


def test_the_costs_of_deep_networks_are_those_of_the_record() -> None:
    _, blocks, resnet = read_benchmarks(RESULTS / "bench" / "deep")["deep"].rows
    (cost, memory), (other, its) = (
        (timing(row).ratio.median, row["tangent"] / row["gradient"]) for row in (blocks, resnet)
    )
    words = " ".join((ROOT / "chapters/results.md").read_text("utf-8").split())
    assert f"{cost:.1f} gradients and {memory:.1f} times the memory of one for twelve" in words
    assert f"{other:.1f} and {its:.1f} for ResNet-18 with 64 images" in words


def test_the_costs_of_the_tool_are_those_of_the_record() -> None:
    assert between("tool costs", "end of tool costs") == tool_lines()


def test_the_rivals_are_those_of_the_records() -> None:
    assert between("rivals", "end of rivals") == [line for line in rival_lines() if line]


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_sequences_are_those_of_the_records(name: str) -> None:
    assert between(name, f"end of {name}") == sequence_lines(name)


def test_the_example_prints_what_the_text_below_it_says() -> None:
    text = page(USE).split("<!-- end of example -->")[1]
    said = [float(number) for number in re.findall(r"0\.\d{3}", text)[:5]]
    kept, before, learned, lost, plain = said
    assert example_output() == pytest.approx([kept, learned], abs=0.02)
    without = example_output(("space.project_(model)", "pass"))
    assert without == pytest.approx([lost, plain], abs=0.02)
    assert lost < kept <= before


@pytest.mark.parametrize("name", [README, USE])
def test_the_report_has_the_layers_and_ranks_the_library_prints(name: str) -> None:
    def layers(lines: list[str]) -> list[list[str]]:
        return [line.split()[:6] for line in lines if "Linear" in line]

    shown = layers(between("report", "end of report", name))
    assert shown == layers(example_report().splitlines())
    assert len(shown) == 3


def test_the_support_table_names_every_rule() -> None:
    def named(kind: type) -> bool:
        stem = kind.__name__.rstrip("123d").removesuffix("Cell")
        return stem in page(USE)

    assert [kind for kind in teleport.layers.RULES if not named(kind)] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_is_pointed_to_exists(name: str) -> None:
    targets = re.findall(r"\]\(((?!http)[^)]+)\)", page(name))
    assert targets or name == COMMANDS
    assert [target for target in targets if not ((ROOT / name).parent / target).exists()] == []


def test_the_readme_is_two_screens_and_names_every_page() -> None:
    assert len(page(README).splitlines()) <= 220
    for name in PAGES[1:]:
        assert f"]({name})" in page(README)


def test_the_picture_is_that_of_the_reading_guide() -> None:
    guide = json.loads(page("chapters/00_reading_guide.ipynb"))
    outputs = [output for cell in guide["cells"] for output in cell.get("outputs", [])]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    picture = (ROOT / "chapters" / "teleport.png").read_bytes()
    assert picture == base64.b64decode(pictures[0])


def test_the_matrix_is_that_of_the_records() -> None:
    """``teleport report chapters/results > chapters/results/matrix.md`` writes it."""
    written = (RESULTS / "matrix.md").read_text(encoding="utf-8")
    read = outcomes.blocks(RESULTS)
    assert len(read) > 30
    assert written.strip() == outcomes.matrix_markdown(read).strip()


def test_every_experiment_is_named() -> None:
    assert [name for name in EXPERIMENTS if f"`{name}`" not in page(COMMANDS)] == []


def test_the_counts_of_the_rule_that_decides_are_those_of_the_records() -> None:
    predicted = {saving.key: saving for saving in read_savings(RESULTS / "saving")}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for block, arm in teleports.arms_of(matrix()):
        key = block.experiment, block.optimizer, arm.baseline
        if key in predicted and counts.schedule_name(block) == "default":
            seconds[predicted[key].pays].append(arm.to_own.seconds)
    goes, stays = seconds[True], seconds[False]
    assert all(ratio < 1 for ratio in goes)
    faster = sum(ratio < 1 for ratio in stays)
    told = (
        f"Of {len(goes) + len(stays)} ways to train it teleports in {len(goes)}, and all of these "
        "end in fewer seconds with a teleport of growth 1.5; of the other "
        f"{len(stays)}, {faster} would, {len(stays) - faster} would not."
    )
    assert told in " ".join((ROOT / README).read_text(encoding="utf-8").split())


def test_sentences_about_records_say_what_the_records_do() -> None:
    """What is listed here should stand, word for word, on its page: mend the sentence there.

    Where the words no longer fit, as "one" to two of them, mend the sentence here, too.
    """
    texts = {name: " ".join(page(name).split()) for name in (README, TABLES)}
    told = [*matrix_sentences(), *other_sentences()]
    wrong = [f"{name} must say: {words}" for name, words in told if words not in texts[name]]
    assert not wrong, "\n".join(wrong)


def test_every_committed_result_is_complete_and_tells_its_command() -> None:
    """And no folder holds a run twice, nor two folders the copy of one: they would not be read."""
    folders, count = record_folders(RESULTS), 0
    for folder in folders:
        if holds_benchmarks(folder):
            for benchmark in read_benchmarks(folder).values():
                assert benchmark.status == "finished", folder
                assert benchmark.config["command"].startswith("teleport bench"), folder
            continue
        runs = read_runs(folder)
        count += len(runs)
        for run in runs:
            assert run.status in ("finished", "diverged"), run.path
            assert run.config["command"].startswith(
                (
                    "teleport run",
                    "teleport sweep",
                    "teleport continual",
                    "teleport keep",
                    "teleport spectrum",
                    "teleport tau",
                    "teleport saving",
                    "teleport moves",
                    "teleport product",
                    "teleport connectivity",
                    "teleport sensitivity",
                )
            ), run.path
    assert count > 1000


if __name__ == "__main__":
    print(*result_lines(), sep="\n")  # noqa: T201
    print(*matrix_lines(), sep="\n")  # noqa: T201
    print(*cost_lines(), sep="\n")  # noqa: T201
    print(*tool_lines(), sep="\n")  # noqa: T201
    for name in SEQUENCES:
        print(*sequence_lines(name), sep="\n")  # noqa: T201
    print(*rival_lines(), sep="\n")  # noqa: T201
    print(example_report())  # noqa: T201
