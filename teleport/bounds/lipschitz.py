"""Lipschitz constants of layers: by how much a module can enlarge a change of its input.

`lipschitz` gives the constant of one module in the l2 norm over all entries of a batch, ``‖f(x̃) -
f(x)‖_F <= c ‖x̃ - x‖_F`` for all x̃. Every constant is proven at its place; those of pooling,
normalisation and activations are the smallest possible, that of a convolution is an upper bound.
In float64, to rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from teleport.errors import UnsupportedModelError
from teleport.layers.convolution import ConvolutionMap, TransposedConvolutionMap

GELU = 0.5 * math.erfc(-1.0) + 1.0 / (math.e * math.sqrt(math.pi))
"""``Φ(√2) + 1 / (e √π)``, 1.1289: the slope ``Φ + x φ`` of ``x Φ(x)`` has derivative ``(2 - x²) φ``
and so its extremes at ``x = ±√2``; the one at -√2 is ``1 - GELU``."""

GELU_TANH = 1.1291
"""Upper bound for the tanh approximation; the test proves it by interval arithmetic."""

SILU = 1.09984
"""Upper bound, by less than 1e-6: the slope ``σ (1 + x (1 - σ))`` of ``x σ(x)`` is extreme where
``x tanh(x / 2) = 2``. There ``σ = (1 + 2 / x) / 2``: the slope is ``(x + 2) / 4``, x = 2.3993573.
"""

LINEAR = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""The layers whose constant is an operator norm; `network` can bound what their moves do."""


def lipschitz(module: nn.Module, x: Tensor, name: str = "") -> float:
    """Lipschitz constant of a module on inputs of the shape of ``x``.

    Args:
        module: a linear layer or convolution, an activation, pooling, BatchNorm in evaluation
            mode, dropout (taken as off), or a change of shape; no container.
        x: an input; for convolutions and pooling its spatial size matters, its values never.
        name: of the module, for the error.

    Returns:
        The constant. A convolution in d dimensions costs one eigenvalue problem of the smaller
        channel count per frequency, half as many frequencies as input positions.

    Raises:
        UnsupportedModelError: if no constant is known for the module, naming it.
    """
    constant = _CONSTANTS.get(type(module))
    if isinstance(module, _DropoutNd):
        return 1.0
    if constant is None:
        raise UnsupportedModelError(f"no bound for {_called(module, name)}: {_why_not(module)}")
    try:
        return constant(module, x)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"no bound for {_called(module, name)}: {error}") from None


def jump(module: nn.Module, x: Tensor, reach: float) -> float:
    """What a module adds to ``c ‖x̃ - x‖`` because it is not continuous; 0 for all but Softplus.

    PyTorch's Softplus is the identity where ``beta x > threshold`` and falls there by
    ``log(1 + exp(-threshold)) / beta``. An entry can cross that point only if it lies within
    ``reach``, a bound on ``‖x̃ - x‖_F``.
    """
    if type(module) is not nn.Softplus:
        return 0.0
    fall = math.log1p(math.exp(-module.threshold)) / module.beta
    crossing = int(((x - module.threshold / module.beta).abs() <= reach).sum())
    return fall * math.sqrt(crossing)


def convolution_norm(module: Any, x: Tensor) -> float:
    """Upper bound on the operator norm of a convolution, transposed or not, at this input size.

    The smaller of two bounds; both hold for every stride, padding, dilation and group count.

    - *Unfolding.* The layer is ``z = W U x``, where U copies each entry of the input to all patches
      it is part of. Every entry of ``U x`` is one entry of x or 0, so ``UᵀU`` is diagonal with the
      number of copies: ``‖U‖₂ = √m`` exactly, with m the largest number of copies of one entry. So
      ``‖z‖ <= √m max_g ‖W_g‖₂`` over groups g. Sharp if patches do not overlap (m = 1). Copies made
      by circular, reflected or replicated padding count.
    - *Frequencies.* After padding, the outputs are some of those of a circular convolution over the
      padded size N: a kernel that lies inside does not wrap. The Fourier transform makes that block
      diagonal, so its norm is the largest ``‖Σ_t W_t exp(-2πi j·t d / N)‖₂`` over frequencies j,
      with taps t and dilation d. Padding itself has norm ``√p``, with p the largest number of
      copies of one entry in the padded input (1 for zeros). Where circular padding reaches no
      further than the kernel, both at once are some outputs of the circular convolution over the
      unpadded size. A transposed convolution is cut out of one over the size of the stretched
      input plus the kernel's reach; stretching with zeros keeps the norm, cutting reduces it.
    """
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        part: Any = TransposedConvolutionMap(module)
    else:
        part = ConvolutionMap(module)
    one = x[:1] if x.dim() == part.dims + 2 else x[None]
    weight = module.weight.detach().double()
    grouped = weight.reshape(module.groups, -1, *weight.shape[1:])
    matrix = part.matrix().double()
    matrix = matrix[..., :-1] if part.has_bias_column else matrix
    unfolded = math.sqrt(_copies(part.rows, one)) * _spectral(matrix)
    sizes, copies = _padded_size(module, part, one)
    return min(unfolded, math.sqrt(copies) * _circular_norm(grouped, module.dilation, sizes))


def _padded_size(module: Any, part: Any, x: Tensor) -> tuple[list[int], float]:
    """Size over which the convolution is circular, and how often padding copies one entry."""
    reaches = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = list(x.shape[2:])
    if isinstance(part, TransposedConvolutionMap):
        steps = zip(sizes, module.stride, reaches, strict=True)
        return [(size - 1) * stride + 1 + reach for size, stride, reach in steps], 1.0
    padded = list(part.padded(x).shape[2:])
    within = all(p - n <= r for p, n, r in zip(padded, sizes, reaches, strict=True))
    if module.padding_mode == "circular" and within:
        return sizes, 1.0
    return padded, _copies(part.padded, x)


def _copies(arrange: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How often ``arrange``, which only copies entries, repeats the one it repeats most."""
    with torch.enable_grad():
        zeros = torch.zeros_like(x, requires_grad=True)
        (counts,) = torch.autograd.grad(arrange(zeros).sum(), zeros)
    return float(counts.max())


def _circular_norm(weight: Tensor, dilation: tuple[int, ...], sizes: list[int]) -> float:
    """Norm of a circular convolution; ``weight`` is ``[groups, channels, channels, *kernel]``."""
    symbol = weight.to(torch.complex128)
    for axis, (step, size) in enumerate(zip(dilation, sizes, strict=True)):
        # A real kernel has conjugate symbols at opposite frequencies: half of one axis is enough.
        count = size // 2 + 1 if axis == len(sizes) - 1 else size
        taps = step * torch.arange(symbol.shape[3], dtype=torch.float64, device=weight.device)
        frequencies = torch.arange(count, dtype=torch.float64, device=weight.device) / size
        angles = -2 * math.pi * torch.outer(taps, frequencies)
        wave = torch.polar(torch.ones_like(angles), angles)
        symbol = torch.tensordot(symbol, wave, dims=([3], [0]))
    return _spectral(symbol.flatten(3).movedim(3, 1))


def _spectral(matrices: Tensor) -> float:
    """The largest spectral norm among ``[..., rows, columns]``, from the smaller Gram."""
    wide = matrices.shape[-2] < matrices.shape[-1]
    gram = matrices @ matrices.mH if wide else matrices.mH @ matrices
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[..., -1].max()), 0.0))


def _eye(size: int) -> Tensor:
    """Spikes at every entry, to read a map's matrix from."""
    return torch.eye(size, dtype=torch.float64, device="cpu")


def _linear(module: nn.Linear, x: Tensor) -> float:
    return _spectral(module.weight.detach().double())


def _batch_norm(module: Any, x: Tensor) -> float:
    """``max |γ| / √(σ² + ε)``: with kept statistics it is a diagonal map."""
    if module.training or module.running_var is None:
        raise UnsupportedModelError(
            "with statistics of the batch its slope grows without bound as the spread of the "
            "batch shrinks; call model.eval() and use kept statistics"
        )
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double().abs()
    return float(scale.max())


def _per_axis(module: Any, x: Tensor, dims: int) -> list[list[Any]]:
    """For each axis the input size and the module's settings on that axis."""
    names = ("kernel_size", "stride", "padding", "dilation")
    settings = [getattr(module, n) for n in names if hasattr(module, n)]
    spread = [s if isinstance(s, tuple) else (s,) * dims for s in settings]
    return [list(line) for line in zip(x.shape[-dims:], *spread, strict=True)]


def _max_pool(dims: int, module: Any, x: Tensor) -> float:
    """``√m``, m the largest number of windows one entry is in: the product over the axes.

    A maximum moves by no more than the entry of its window that moves most, so the sum of squares
    counts each entry once per window; raising one entry above all others reaches it.
    """
    if module.return_indices:
        raise UnsupportedModelError("return_indices is not handled; leave it out")
    windows = 1.0
    for size, kernel, stride, padding, dilation in _per_axis(module, x, dims):
        eye = _eye(size)
        found = functional.max_pool1d(eye, kernel, stride, padding, dilation, module.ceil_mode)
        windows *= float(found.sum(dim=1).max())
    return math.sqrt(windows)


def _average_pool(dims: int, module: Any, x: Tensor) -> float:
    """The product of the exact norms along the axes: windows and divisors are products, too."""
    if getattr(module, "divisor_override", None) is not None:
        raise UnsupportedModelError("divisor_override is not handled; leave it out")
    norm = 1.0
    for size, kernel, stride, padding in _per_axis(module, x, dims):
        eye = _eye(size)
        norm *= _spectral(
            functional.avg_pool1d(
                eye, kernel, stride, padding, module.ceil_mode, module.count_include_pad
            )
        )
    return norm


def _adaptive_pool(dims: int, average: bool, module: Any, x: Tensor) -> float:
    """As for pooling with fixed windows; these may overlap by one entry."""
    wanted = module.output_size
    wanted = wanted if isinstance(wanted, tuple) else (wanted,) * dims
    found = 1.0
    for size, count in zip(x.shape[-dims:], wanted, strict=True):
        pooled = functional.adaptive_avg_pool1d(_eye(size), size if count is None else count)
        windows = float((pooled > 0).sum(dim=1).max())
        found *= _spectral(pooled) if average else math.sqrt(windows)
    return found


def _always(constant: float) -> Callable[[Any, Tensor], float]:
    return lambda module, x: constant


def _by_axes(
    constant: Callable[[int, Any, Tensor], float], *kinds: type[nn.Module]
) -> dict[type[nn.Module], Callable[[Any, Tensor], float]]:
    """A constant that needs the number of axes, for kinds with one axis, with two, and so on."""
    return {kind: partial(constant, dims) for dims, kind in enumerate(kinds, 1)}


_CONSTANTS: dict[type[nn.Module], Callable[[Any, Tensor], float]] = {
    nn.Linear: _linear,
    **dict.fromkeys(LINEAR[1:], convolution_norm),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten), _always(1.0)),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softplus), _always(1.0)),
    nn.Sigmoid: _always(0.25),
    nn.LeakyReLU: lambda module, x: max(1.0, abs(module.negative_slope)),
    nn.ELU: lambda module, x: max(1.0, abs(module.alpha)),
    nn.GELU: lambda module, x: GELU if module.approximate == "none" else GELU_TANH,
    nn.SiLU: _always(SILU),
    **_by_axes(_max_pool, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    **_by_axes(_average_pool, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    nn.AdaptiveAvgPool1d: partial(_adaptive_pool, 1, True),
    nn.AdaptiveAvgPool2d: partial(_adaptive_pool, 2, True),
    nn.AdaptiveAvgPool3d: partial(_adaptive_pool, 3, True),
    nn.AdaptiveMaxPool1d: partial(_adaptive_pool, 1, False),
    nn.AdaptiveMaxPool2d: partial(_adaptive_pool, 2, False),
    nn.AdaptiveMaxPool3d: partial(_adaptive_pool, 3, False),
}


def _called(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _why_not(module: nn.Module) -> str:
    if any(isinstance(inner, nn.MultiheadAttention) for inner in module.modules()):
        return (
            "dot-product attention is not Lipschitz on unbounded inputs (Kim, Papamakarios and "
            f"Mnih, 2021). {_INSTEAD}"
        )
    known = ", ".join(sorted(t.__name__ for t in _CONSTANTS))
    return f"known are nn.Sequential, dropout and {known}. {_INSTEAD}"


_INSTEAD = (
    "The bound of each layer (LayerReport.output_bound) and the measured drift of the loss are in "
    "the report of every teleport"
)
