"""What stands around the package says what is so: contributing, workflows, forms for issues.

``python tests/test_house.py`` prints the picture of the house.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
ACTIONS = {
    "actions/checkout", "actions/configure-pages", "actions/deploy-pages",
    "actions/download-artifact", "actions/setup-python", "actions/upload-artifact",
    "actions/upload-pages-artifact", "pypa/gh-action-pypi-publish",
}  # fmt: skip
"""Those of GitHub, and the Python Packaging Authority's."""


def picture() -> list[str]:
    """The floors of the first import contract as a Mermaid diagram, with the rooms of folders."""
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (house, *folders) = [one for one in contracts if one["type"] == "layers"]
    inside = {one["containers"][0].removeprefix("teleport."): one["layers"] for one in folders}
    lines = ["```mermaid", "flowchart TD"]
    for number, floor in enumerate(house["layers"]):
        text = "<br>".join(told(room, inside.get(room, [])) for room in floor.split(" | "))
        lines.append(f'  floor{number}["{text}"]')
    lines.append("  " + " --> ".join(f"floor{n}" for n in range(len(house["layers"]))))
    return [*lines, "```"]


def told(room: str, floors: list[str]) -> str:
    """A module, or a folder with the modules in it from the top to the ground."""
    name = f"<b>{room}</b>" if (ROOT / "teleport" / room).is_dir() else room
    return f"{name}: {', '.join(' | '.join(floors).split(' | '))}" if floors else name


def test_the_picture_of_the_house_is_that_of_the_import_contracts() -> None:
    text = (GITHUB / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- house.*?-->\n(.*?)<!-- end of house", text, re.DOTALL)
    assert found is not None
    assert found.group(1).splitlines() == picture()
    for contract in PROJECT["tool"]["importlinter"]["contracts"]:
        for floor in contract.get("layers", []):
            for room in floor.split(" | "):
                assert re.search(rf"\b{room}\b", found.group(1)), room


def read(path: Path) -> dict[Any, Any]:
    """A YAML file; `on`, which YAML takes for a truth value, by its name."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in content.items()}


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_limits_and_uses_known_actions_of_one_major_version(path: Path) -> None:
    workflow = read(path)
    assert {"name", "on", "permissions", "jobs"} <= set(workflow)
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        assert {job["needs"]} <= set(workflow["jobs"]) if "needs" in job else True
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            action, version = step["uses"].split("@")
            assert action in ACTIONS
            assert re.fullmatch(r"(release/)?v\d+", version)


def test_there_are_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["book", "release", "tests"]


def test_every_declared_python_is_tested() -> None:
    classifiers = PROJECT["project"]["classifiers"]
    declared = [c.split(" :: ")[-1] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    (low, high) = (declared[0], declared[-1])
    after = f"3.{int(high.split('.')[1]) + 1}"
    assert PROJECT["project"]["requires-python"] == f">={low},<{after}"
    jobs = read(GITHUB / "workflows" / "tests.yml")["jobs"]
    for name in ("quick", "all", "readme"):
        assert jobs[name]["strategy"]["matrix"]["python"] == declared


def test_commands_of_workflows_are_those_that_the_project_has() -> None:
    """Extras exist, and every option of pytest is one that the tests or the project declare."""
    known = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        extras = {e for found in re.findall(r"\[(\w+)\]['\"]", text) for e in found.split(",")}
        assert extras <= set(PROJECT["project"]["optional-dependencies"])
        for tier in re.findall(r"tier: (--\w+)", text):
            assert f'addoption("{tier}"' in known
    contributing = (GITHUB / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for option in re.findall(r"`pytest.*? (--\w+)`", contributing):
        assert f'addoption("{option}"' in known


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something(path: Path) -> None:
    form = read(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "labels", "body"} == set(form)
    identities = [field["id"] for field in form["body"]]
    assert len(set(identities)) == len(identities) >= 2
    for field in form["body"]:
        assert field["type"] in ("input", "textarea")
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])


if __name__ == "__main__":
    print(*picture(), sep="\n")  # noqa: T201
