"""Memory that a teleport has freed is there for the next tensors: no page is cleared again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource
import torch
from torch import nn
from teleport import Teleporter

torch.manual_seed(0)
torch.set_num_threads(1)
x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))  # a layer gives 8 MB
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(2048, 10),
)
teleporter = Teleporter(model)
found = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert teleporter.step(lambda: nn.functional.cross_entropy(model(x), y)).steps == 1
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(found[2:])[3])  # the first ones find their places
"""


def page_faults(tmp_path: Path, program: str = PROGRAM, **more: str) -> int:
    """Of one teleport, or as another program counts them."""
    (tmp_path / "program.py").write_text(program)
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"],
        env={**mine, **more},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc does with freed memory")
def test_a_teleporter_keeps_what_it_frees_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    given_back = page_faults(tmp_path, MALLOC_TRIM_THRESHOLD_="131072")
    if given_back < 1000:
        pytest.skip(f"{given_back} page faults: they are not counted here, or pages are large")
    assert page_faults(tmp_path) < given_back / 10


FILLING = """
import resource
import torch
from teleport.runtime.memory import keep_freed_memory

torch.use_deterministic_algorithms(True)  # PyTorch fills what torch.empty gives then
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
keep_freed_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="what Linux counts as a page fault")
def test_what_is_taken_and_freed_is_never_written_to(tmp_path: Path) -> None:
    assert page_faults(tmp_path, FILLING) < 100
