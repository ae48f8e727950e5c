"""The parts of the book's pages that are generated: contents, public names, how to cite."""

import inspect
from types import ModuleType
from typing import Any

import teleport
from teleport.book.manifest import Book


def contents(book: Book) -> str:
    """The table of contents as MyST: the chapters, their exercises, and the pages behind them."""
    exercises = [c.exercises for c in book.chapters if c.exercises is not None]
    parts = [
        _tree("Chapters", [book.document(c.file) for c in book.chapters], ":numbered:\n"),
        _tree("Exercises", [book.document(file) for file in exercises]),
        _tree("Reference", [book.document(file) for file in book.pages]),
    ]
    return "\n".join(parts)


def _tree(caption: str, documents: list[str], option: str = "") -> str:
    if not documents:
        return ""
    names = "\n".join(f"/{name}" for name in documents)
    return f"```{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n{option}\n{names}\n```\n"


def public_names() -> str:
    """The reference of all public names of the package as MyST, from their docstrings."""
    names = {name: getattr(teleport, name) for name in teleport.__all__ if name[0] != "_"}
    modules = {name: value for name, value in names.items() if isinstance(value, ModuleType)}
    errors = [name for name, value in names.items() if _is_error(value)]
    rest = [name for name in names if name not in modules and name not in errors]
    parts = ["## Teleporting and null spaces\n", _rst(map(_entry, sorted(rest, key=str.lower)))]
    parts += ["## Errors\n", _rst(map(_entry, errors))]
    for name, module in modules.items():
        parts += [f"## teleport.{name}\n", _rst([_module(module)])]
    return "\n".join(parts)


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _entry(name: str) -> str:
    value = getattr(teleport, name)
    if _is_error(value):
        return f".. autoexception:: teleport.{name}\n   :show-inheritance:\n"
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    return f".. {kind}:: teleport.{name}\n" + ("   :members:\n" if kind == "autoclass" else "")


def _module(module: ModuleType) -> str:
    """By where it lies, which need not be the name it is public under."""
    members = "   :imported-members:\n" if hasattr(module, "__all__") else ""
    return f".. automodule:: {module.__name__}\n   :members:\n{members}"


def _rst(entries: Any) -> str:
    return "```{eval-rst}\n" + "\n".join(entries) + "```\n"


def citation(cff: dict[str, Any]) -> str:
    """BibTeX entries of the software and of what it builds on, from the data of CITATION.cff."""
    entries = [_bibtex("teleport-software", {**cff, "type": "software"})]
    for reference in cff.get("references", []):
        first = reference["authors"][0].get("family-names", "anonymous").lower()
        entries.append(_bibtex(f"{first}{reference['year']}", reference))
    return "```bibtex\n" + "\n\n".join(entries) + "\n```\n"


def _bibtex(key: str, source: dict[str, Any]) -> str:
    people = [
        f"{{{a['name']}}}" if "name" in a else f"{a['family-names']}, {a['given-names']}"
        for a in source["authors"]
    ]
    fields = {
        "author": " and ".join(people),
        "title": f"{{{source['title']}}}",
        "year": str(source.get("year") or source["date-released"])[:4],
        "version": source.get("version"),
        "note": ", ".join(i["value"] for i in source.get("identifiers", [])) or None,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value is not None]
    return "\n".join([f"@misc{{{key},", *lines, "}"])
