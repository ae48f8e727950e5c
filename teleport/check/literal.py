"""Values as code: what is printed is what reproduces them, bit for bit."""

from typing import Any

import torch
from torch import Tensor

MOST_CHARACTERS = 600
"""Characters of a value that is not ours to print whole."""


MOST_ENTRIES = 200
"""Entries of a tensor or list that is printed whole."""


def statements(name: str, value: Any) -> list[str]:
    """Code that binds ``name`` to a value of a case, which may have a method that knows it."""
    if hasattr(value, "statements"):
        return list(value.statements(name))
    return [f"{name} = {literal(value)}"]


def literal(value: Any) -> str:
    """An expression for tensors, numbers and lists of them; a cut ``repr`` for anything else."""
    if (type(value) is Tensor or isinstance(value, torch.nn.Parameter)) and dense(value):
        return _tensor(value.detach())
    if isinstance(value, (list, tuple)) and len(value) > MOST_ENTRIES:
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(literal, value))}{',' if len(value) == 1 else ''})"
    return shown(value)


def shown(value: Any, longest: int = MOST_CHARACTERS) -> str:
    """The beginning of its ``repr``, or why it has none."""
    try:
        return cut(repr(value), longest)
    except Exception as error:  # a number of too many digits, a method of a learner's own
        return f"(its repr raises {type(error).__name__})"


def cut(text: str, longest: int = MOST_CHARACTERS) -> str:
    """The text, or its beginning and how much was left out; without what terminals act on."""
    left_out = len(text) - longest
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text[:longest])
    return text if left_out <= 0 else f"{text} … ({left_out} more characters)"


def dense(tensor: Tensor) -> bool:
    """Whether it has a value at each place: it is not sparse, nested or of the device "meta"."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)


def _tensor(value: Tensor) -> str:
    if value.numel() > MOST_ENTRIES:
        return f"a tensor of shape {tuple(value.shape)}"
    dtype = "" if value.dtype in (torch.int64, torch.bool) else f", dtype={value.dtype}"
    if value.numel() == 0:
        return f"torch.empty({tuple(value.shape)}{dtype})"
    return f"torch.tensor({_nested(value.tolist())}{dtype})"


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_nested, value))}]"
    if isinstance(value, float) and value != value:
        return 'float("nan")'
    if isinstance(value, float) and value in (float("inf"), -float("inf")):
        return f'float("{value}")'
    return str(value).removesuffix("0") if str(value).endswith(".0") else str(value)
