"""Answers that are wrong throughout, kept as files in ``wrong_answers``."""

import importlib.util
from pathlib import Path

from teleport import check

WRONG = sorted((Path(__file__).parent / "wrong_answers").glob("*.py"))


def functions_of(path):
    """The function for each check, by its name; the docstring says what has to be answered."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module, name) for name in check.CHECKS}
