"""What ranks send is what the formulas say; the page on scaling is what the record says.

``python tests/lab/bench/test_ranks.py`` prints the tables of the page.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from teleport.lab.bench.ranks import COUNTS, PURPOSES, LayerSize, cases, measured, predicted
from teleport.lab.bench.tables import read_benchmarks

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "chapters" / "pages" / "scaling.md"

BLOCKS, WIDTH, TOKENS, MANY = 24, 2048, 8192, 1024
"""A GPT-like of 1.2e9 numbers, with so many tokens on each of so many ranks."""


def rows() -> list[dict[str, Any]]:
    return read_benchmarks(ROOT / "chapters" / "results" / "ranks")["ranks"].rows


def mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def measured_lines() -> list[str]:
    titles = ["n", "ranks", *PURPOSES, "other", "exchanges", "memory"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows():
        pairs = [f"{mib(row['taken'][k])} ({mib(row['predicted'][k])})" for k in PURPOSES]
        ends = [mib(row["taken"]["other"]), str(row["exchanges"]), mib(row["peak"])]
        n = f"{row['rows']:,}, τ = {row['tau']:g}"
        lines.append(f"| {' | '.join([n, str(row['ranks']), *pairs, *ends])} |")
    return lines


def layers(width: int = WIDTH) -> dict[str, list[LayerSize]]:
    """The matrices of one block, with half of the directions kept."""
    shapes = {
        "q, k, v and output": [(width, width + 1)] * 4,
        "first of the feed-forward pair": [(4 * width, width + 1)],
        "second of the pair": [(width, 4 * width + 1)],
    }
    return {
        name: [LayerSize(d_out, d_in, d_in // 2) for d_out, d_in in same]
        for name, same in shapes.items()
    }


def decomposition(layer: LayerSize) -> int:
    """Operations of a symmetric eigendecomposition with vectors (Golub and Van Loan, 8.3)."""
    return 9 * layer.d_in**3


def predicted_lines() -> list[str]:
    titles = ["all 24 blocks", *PURPOSES, "Gram matrices", "bases held", "decompositions"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    looks = max(row["looks"] for row in rows())
    blocks = layers()
    for name, own in {
        **blocks,
        "together": [one for same in blocks.values() for one in same],
    }.items():
        every = own * BLOCKS
        numbers = sum(layer.d_out * layer.d_in for layer in every)
        found = predicted(MANY, every, MANY * TOKENS, numbers, looks)
        cells = [f"{found[kind] / 1e9:.1f} GB" for kind in PURPOSES]
        cells.append(f"{sum(8 * layer.d_in**2 for layer in every) / 1e9:.1f} GB")
        cells.append(f"{sum(8 * layer.d_in * (layer.rank or 0) for layer in every) / 1e9:.1f} GB")
        cells.append(f"{sum(map(decomposition, every)) / 1e12:.0f} Tflop")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


@pytest.mark.parametrize("lines", [measured_lines, predicted_lines], ids=lambda f: f.__name__)
def test_the_tables_of_the_page_are_those_of_record_and_formulas(lines: Any) -> None:
    assert "\n".join(lines()) in PAGE.read_text(encoding="utf-8")


def test_the_record_holds_what_the_formulas_say() -> None:
    found = rows()
    assert [row["ranks"] for row in found] == [*COUNTS, *COUNTS]
    for row in found:
        sizes = [LayerSize(**layer) for layer in row["layers"]]
        formula = predicted(row["ranks"], sizes, row["rows"], row["parameters"], row["looks"])
        assert formula == row["predicted"]
        close(row)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(small=True), ids=lambda case: f"{case.rows} rows")
def test_two_ranks_take_in_what_the_formulas_say(case: Any) -> None:
    row = measured(case, 2)
    assert row["looks"] >= 3  # at the start, on the way and at the end
    assert min(row["taken"][kind] for kind in PURPOSES) > 0
    close(row)


def close(row: dict[str, Any]) -> None:
    """To one number for each rank and exchange: by so many a sum is made divisible."""
    for kind in PURPOSES:
        apart = abs(row["taken"][kind] - row["predicted"][kind])
        assert apart <= 8 * row["ranks"] * row["exchanges"], (kind, row["taken"], row["predicted"])


if __name__ == "__main__":
    for made in (measured_lines, predicted_lines):
        sys.stdout.write("\n".join([*made(), "", ""]))
