"""What commands print: nothing of a table is cut off, however narrow the terminal."""

from io import StringIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Column, Table

from teleport.cli import output

WORDS = st.lists(st.text("abc0.-", min_size=1, max_size=12), max_size=4).map(" ".join)


@st.composite
def contents(draw: st.DrawFn) -> list[list[str]]:
    """The heads and the cells of a table, row by row."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    found = [[draw(WORDS) for _ in range(columns)] for _ in range(rows + 1)]
    found[0][0] = "first-column"  # so wide that no word of title and caption is broken
    return found


def printed(rows: list[list[str]], width: int, terminal: bool) -> list[str]:
    """The lines of a table whose first column is not to be wrapped."""
    file = StringIO()

    def console(**_: Any) -> Console:
        return Console(file=file, force_terminal=terminal, width=width, color_system=None)

    first, *others = rows[0]
    table = Table(Column(first, no_wrap=True), *others, title="the title", caption="its caption")
    for row in rows[1:]:
        table.add_row(*row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "console", console)
        output.print_tables(table)
    return file.getvalue().splitlines()


def parts(lines: list[str]) -> int:
    """How many tables there are."""
    return sum(line.lstrip().startswith("┏") for line in lines)


@given(rows=contents(), width=st.integers(40, 120))
def test_no_word_is_cut_and_no_line_too_long(rows: list[list[str]], width: int) -> None:
    lines = printed(rows, width, terminal=True)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    for word in " ".join(cell for row in rows for cell in row).split():
        assert any(word in line for line in lines), word
    text = " ".join(" ".join(lines).split())
    assert text.count("continued") == parts(lines) - 1
    assert text.count("caption") == 1, "below the last part"


@given(rows=contents(), width=st.integers(100, 400), terminal=st.booleans())
def test_a_table_that_has_room_and_one_in_a_file_is_in_one_piece(
    rows: list[list[str]], width: int, terminal: bool
) -> None:
    whole = 1 + sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))
    if terminal and whole > width:
        return
    assert parts(printed(rows, width, terminal)) == 1
