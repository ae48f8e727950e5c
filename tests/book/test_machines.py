"""What the book prints holds on every machine.

PyTorch, oneDNN, MKL, OpenBLAS, NumPy and the C library each choose, by the processor, among several
ways to compute the same, and each rounds in its own way. Here they are told to choose as on other
machines. Figures are not drawn.

A run of all chapters costs three to five CPU minutes. The slow tests make half of one: every fourth
chapter as on an old processor, where most differs from a new one, and every fourth other one as on
one with AVX2 (chapter 9 alone takes a minute, and is not among them); a workflow runs all every
week. With ``TELEPORT_MACHINES=all`` every chapter runs in every way, and so do the tests of the
README.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from teleport.book import notebook_form
from tests.support.machines import printed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
WANTED = "TELEPORT_MACHINES"

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}
OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX,-FMA,-FMA4",
}
MACHINES = {
    "PyTorch default": {"ATEN_CPU_CAPABILITY": "default"},
    "PyTorch avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "this one": {},
    "AVX2": AVX2,
    "AVX2, not Intel's": {**AVX2, "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Zen"},
    "old": OLD,
}
"""By name, what the environment says; with NumPy before 2.4 its part goes on as on this one."""

CASES = [(name, threads) for name in MACHINES for threads in (1, 2)]


def environment(machine: str, threads: int) -> dict[str, str]:
    return {**os.environ, **MACHINES[machine], "OMP_NUM_THREADS": str(threads)}


def wanted(machine: str, threads: int) -> list[Path]:
    """The chapters that run in this way."""
    if os.environ.get(WANTED) == "all":
        return CHAPTERS
    rest = {("old", 1): 0, ("AVX2", 1): 2}.get((machine, threads))
    return [c for c in CHAPTERS if int(c.name[:2]) % 4 == rest]


def compared(chapter: Path) -> list[Any]:
    """The code cells whose outputs nbval compares."""
    code = [
        cell
        for cell in notebook_form.load_notebook(chapter)["cells"]
        if cell["cell_type"] == "code"
    ]
    return [c for c in code if "nbval-ignore-output" not in c["metadata"].get("tags", ())]


@pytest.mark.parametrize(("machine", "threads"), CASES)
def test_the_chapters_print_what_is_committed(machine: str, threads: int, tmp_path: Path) -> None:
    chapters = wanted(machine, threads)
    if not chapters:
        pytest.skip(f"takes minutes: set {WANTED}=all")
    file = tmp_path / "printed.json"
    command = [sys.executable, "-m", "tests.support.machines", str(file), *map(str, chapters)]
    subprocess.run(command, cwd=ROOT, env=environment(machine, threads), check=True)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {name: told for name, told in found.items() if isinstance(told, str)} == {}
    different = {}
    for chapter in chapters:
        for cell in compared(chapter):
            committed, here = printed(cell["outputs"]), found[chapter.stem][cell["id"]]
            if here != committed:
                different[chapter.stem, cell["id"]] = (committed, here)
    assert different == {}


@pytest.mark.parametrize(("machine", "threads"), CASES)
def test_the_readme_is_that_of_the_records(machine: str, threads: int) -> None:
    if os.environ.get(WANTED) != "all":
        pytest.skip(f"takes minutes: set {WANTED}=all")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_readme.py"]
    subprocess.run(command, cwd=ROOT, env=environment(machine, threads), check=True)
