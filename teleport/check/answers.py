"""Comparing answers: is this of the right kind, and is it the same value?"""

import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teleport.check.literal import dense, shown

ANSWER_TOLERANCE = 1e-9
"""Relative to the largest entry: rounding of float64 in cases as small as ours stays far below."""


def misfit(answer: Any, like: Any) -> tuple[str, str] | None:
    """What is wrong with the kind of an answer: a sentence and advice, or None.

    Numbers may come as tensors of one element, and lists as tuples.
    """
    if answer is None:
        return "nothing was returned", "End your function with a `return` of its result."
    if isinstance(answer, Tensor) and not dense(answer):
        advice = "Return a dense tensor: x.to_dense()."
        return f"a tensor with its values was expected, not {_kind(answer)}", advice
    if isinstance(like, bool):
        return _not_bool(answer)
    if isinstance(like, (int, float)):
        return _not_number(answer, whole=isinstance(like, int))
    if isinstance(like, Tensor):
        return _not_tensor(answer, like)
    return _not_sequence(answer, like)


def alike(first: Any, second: Any, tolerance: float = ANSWER_TOLERANCE) -> bool:
    """Whether two answers have the same values; never raises."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(
            alike(a, b, tolerance) for a, b in zip(first, second, strict=True)
        )
    a, b = _as_tensor(first), _as_tensor(second)
    if a is None or b is None:
        return first is None and second is None
    if a.shape != b.shape and not a.numel() == b.numel() == 1:
        return False
    return near(a.reshape(b.shape), b, tolerance)


def near(a: Tensor, b: Tensor, tolerance: float = ANSWER_TOLERANCE) -> bool:
    """Whether two tensors of one shape agree up to rounding, relative to the larger one."""
    if not a.numel():
        return True
    a, b = a.double(), b.double()
    sizes = torch.stack([a.abs(), b.abs()])
    scale = 1.0 + float(sizes[sizes.isfinite()].amax()) if sizes.isfinite().any() else 1.0
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * scale)
    return bool(same.all())


def finite(value: Any) -> bool:
    """Whether no number of an answer is infinite or NaN."""
    if isinstance(value, (list, tuple)):
        return all(map(finite, value))
    tensor = _as_tensor(value)
    return tensor is None or bool(tensor.double().isfinite().all())


def plain(value: Any) -> Any:
    """A number out of its tensor or array of one element; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if dense(value) and value.numel() == 1 else value
    one = isinstance(value, (np.generic, np.ndarray)) and value.size == 1
    return value.item() if one else value


def vanishes(tensor: Tensor) -> bool:
    """Whether all entries are 0 up to rounding."""
    return near(tensor, torch.zeros_like(tensor))


def factor(answer: Any, expected: Any) -> float | None:
    """The number c with ``answer = c expected``, if there is one and ``expected`` is not 0."""
    a, b = _flat(answer), _flat(expected)
    if a is None or b is None or a.shape != b.shape or vanishes(b):
        return None
    c = float((a @ b) / (b @ b))
    return c if near(a, c * b) else None


def transposed(value: Any) -> Any:
    """Every matrix of an answer transposed."""
    if isinstance(value, (list, tuple)):
        return [transposed(part) for part in value]
    return value.T if isinstance(value, Tensor) and value.ndim == 2 else value


def _flat(value: Any) -> Tensor | None:
    if isinstance(value, (list, tuple)):
        parts = [_flat(part) for part in value]
        found = [part for part in parts if part is not None]
        return torch.cat(found) if found and len(found) == len(parts) else None
    tensor = _as_tensor(value)
    return None if tensor is None else tensor.double().flatten()


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.cpu() if dense(value) and not value.is_complex() else None
    number = plain(value)
    if isinstance(number, numbers.Real):
        return torch.tensor(_float(number), dtype=torch.float64)
    return None


def _float(number: Any) -> float:
    """A real number; infinite where it is too large for a float."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _not_bool(answer: Any) -> tuple[str, str] | None:
    if isinstance(plain(answer), bool):
        return None
    return f"True or False was expected, not {_kind(answer)}", ""


def _not_number(answer: Any, whole: bool) -> tuple[str, str] | None:
    answer = plain(answer)
    wanted = "a whole number" if whole else "a number"
    if not isinstance(answer, numbers.Real) or isinstance(answer, bool):
        return f"{wanted} was expected, not {_kind(answer)}", ""
    if whole and not _float(answer).is_integer():
        return f"{wanted} was expected, not {_float(answer)}", ""
    return None


def _not_tensor(answer: Any, like: Tensor) -> tuple[str, str] | None:
    shape = tuple(like.shape)
    if not isinstance(answer, Tensor):
        return (
            f"a tensor of shape {shape} was expected, not {_kind(answer)}",
            "Return a torch.Tensor; torch.as_tensor makes one of an array or a list.",
        )
    if answer.shape != like.shape:
        turned = answer.ndim == 2 and answer.T.shape == like.shape
        advice = "The transposed result would have the right shape." if turned else ""
        return f"the shape is {tuple(answer.shape)} instead of {shape}", advice
    if answer.dtype != like.dtype:
        return (
            f"the dtype is {answer.dtype} instead of {like.dtype}",
            "Give new tensors the dtype of the inputs: torch.eye(n, dtype=x.dtype), x.new_ones(n).",
        )
    if answer.device != like.device:
        return f"the tensor is on {answer.device} instead of {like.device}", "Return x.cpu()."
    return None


def _not_sequence(answer: Any, like: Any) -> tuple[str, str] | None:
    if not isinstance(answer, (list, tuple)):
        return f"{len(like)} values in a list or tuple were expected, not {_kind(answer)}", ""
    if len(answer) != len(like):
        return f"{len(like)} values were expected, not {len(answer)}", ""
    for place, (part, wanted) in enumerate(zip(answer, like, strict=True)):
        found = misfit(part, wanted)
        if found is not None:
            return f"entry {place}: {found[0]}", found[1]
    return None


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {shown(value, 60)}"
