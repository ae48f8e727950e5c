"""The packages that build the book and write questions; they come with extras."""

from importlib import import_module
from types import ModuleType

from teleport.errors import BookError


def needed(name: str, extra: str = "book", task: str = "building the book") -> ModuleType:
    """Import a module of an extra, ``book`` if no other is named, for a task.

    BookError if it is not installed, with the line that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BookError(
            f"{task} needs the package {error.name}, which is not installed; "
            f"run `pip install '.[{extra}]'` in the top folder of the repository"
        ) from error
