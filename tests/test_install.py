"""Ways to install say the same as pyproject.toml: conda, a container, the README, the citation."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RECIPE = ROOT / ".github" / "conda" / "recipe.yaml"
CONTAINER = ROOT / ".github" / "Containerfile"
IN_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
"""Names of packages that have another one there."""

INSTRUCTIONS = {"FROM", "RUN", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
NOT_IN_THE_JOB = {"pip install '.[test]'", "pytest", "teleport book serve"}
"""The first two are a job of their own; the last ends with Ctrl-C only."""


def recipe() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return found


def ranges(lines: list[str]) -> dict[str, set[str]]:
    """By name the bounds of requirements, pip's or conda's; markers of Python are left out."""
    found = [Requirement(line.split(";")[0]) for line in lines]
    return {one.name: {str(bound) for bound in one.specifier} for one in found}


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert recipe()["context"]["version"] == version
    changes = (ROOT / "chapters" / "pages" / "changelog.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+?),", changes, re.MULTILINE)[0] == version


def test_the_conda_recipe_needs_what_the_project_needs() -> None:
    found = recipe()
    run = ranges(found["requirements"]["run"])
    needed = ranges(PROJECT["project"]["dependencies"])
    python = ranges([f"python{PROJECT['project']['requires-python']}"])
    assert run == {
        **{IN_CONDA.get(name, name): bounds for name, bounds in needed.items()},
        **python,
    }
    host = ranges(found["requirements"]["host"])
    assert {**ranges(PROJECT["build-system"]["requires"]), **python, "pip": set()} == host
    assert found["package"]["name"] == PROJECT["project"]["name"]
    assert found["about"]["license"] == PROJECT["project"]["license"]
    assert found["about"]["summary"].replace(",", ":", 1) == PROJECT["project"]["description"]
    scripts = [f"{name} = {place}" for name, place in PROJECT["project"]["scripts"].items()]
    assert found["build"]["python"]["entry_points"] == scripts
    assert (RECIPE.parent / found["source"]["path"]).resolve() == ROOT


def test_the_container_has_a_declared_python_and_torch_and_no_root() -> None:
    text = re.sub(r"^#.*\n", "", CONTAINER.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.partition(" ") for line in text.splitlines() if line]
    assert {name for name, _, _ in lines} == INSTRUCTIONS
    said = {name: rest for name, _, rest in lines}
    python = re.fullmatch(r"docker.io/library/python:(3\.\d+)-slim-bookworm", said["FROM"])
    assert python is not None
    assert f"Programming Language :: Python :: {python[1]}" in PROJECT["project"]["classifiers"]
    (torch,) = [d for d in PROJECT["project"]["dependencies"] if d.startswith("torch")]
    assert f"'{torch}'" in text
    assert said["USER"].isdigit()
    assert said["USER"] != "0"
    assert yaml.safe_load(said["ENTRYPOINT"]) == list(PROJECT["project"]["scripts"])


def commands(lines: list[str]) -> set[str]:
    """One by one, without their comments and sizes, and with any folder of runs."""
    alone = [re.sub(r"\s+#.*", "", line).split(" && ") for line in lines]
    return {
        re.sub(r" --preset \w+|(?<=runs/)\S+", "", one) for line in alone for one in line if one
    }


def test_every_command_of_the_readme_runs_in_the_workflow() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["readme"]["steps"]
    ran = commands([step["run"] for step in steps if "run" in step])
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    wanted = commands([line for block in blocks for line in block.splitlines()])
    assert len(wanted) > 12
    assert wanted - ran == NOT_IN_THE_JOB


def test_the_book_brings_what_its_chapters_check_with() -> None:
    """Their boxes say ``pip install '.[book]'``, and their cells call `teleport.check`."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert ranges(extras["course"])["hypothesis"] == ranges(extras["book"])["hypothesis"]


@pytest.mark.parametrize("line", ["numpy>=1.26", "numpy >=1.26"])
def test_bounds_are_read_as_pip_and_conda_write_them(line: str) -> None:
    assert ranges([line]) == {"numpy": {">=1.26"}}
