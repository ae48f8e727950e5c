"""The packages that build the book; they come with the extra ``book``."""

from importlib import import_module
from types import ModuleType

from teleport.errors import BookError


def needed(name: str) -> ModuleType:
    """Import a module of the extra ``book``.

    Raises:
        BookError: if it is not installed, with the line that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BookError(
            f"building the book needs the package {error.name}, which is not installed; "
            "run `pip install '.[book]'` in the top folder of the repository"
        ) from error
