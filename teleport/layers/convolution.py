"""Convolutions: patches as rows, one null space per group."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport.layers.part import (
    CHUNK,
    PIECES,
    LinearMap,
    ParameterSlice,
    Pieces,
    carried_back,
    optional_slice,
    with_bias_column,
)
from teleport.layers.rule import LayerRule, register


class _SpatialMap(LinearMap):
    """What both kinds of convolution share: channels first, one row per output position."""

    functions: tuple[Any, Any, Any]

    def __init__(self, module: Any) -> None:
        super().__init__("", ParameterSlice(module, "weight"), optional_slice(module, "bias"))
        self.module = module
        self.dims = len(module.kernel_size)
        self.groups = module.groups
        self.shape = module.weight.shape
        self._conv = self.functions[self.dims - 1]

    @cached_property
    def matrix_shape(self) -> torch.Size:
        d_out, d_in = self._sizes()
        groups = (self.groups,) if self.groups > 1 else ()
        return torch.Size((*groups, d_out, d_in + self.has_bias_column))

    @abstractmethod
    def _sizes(self) -> tuple[int, int]:
        """Rows and columns of the weight as the matrix of one group."""

    def out_rows(self, z: Tensor) -> Tensor:
        return _grouped(_batched(z, self.dims), self.groups, axes=0)

    def from_out_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        return _ungrouped(rows, self.groups, like, self.dims)

    def weighted_norms(self, z: Tensor, weights: Tensor) -> Tensor:
        """With channels first, as they lie: no row is formed."""
        pieces = _batched(z, self.dims).flatten(2).unflatten(1, (self.groups, -1))
        every = weights.square().reshape(self.groups, 1, -1)
        sums = torch.cat([every @ some.square() for some in pieces.tensor_split(PIECES)]).sqrt()
        rows: Tensor = sums[:, :, 0].movedim(1, 0).flatten(1)
        return rows[0] if self.groups == 1 else rows

    @abstractmethod
    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the module computes with a given weight and bias."""

    def push(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._apply(x, weight)

    def push_affine(self, x: Tensor, pieces: Pieces, like: Tensor) -> Tensor:
        return self._apply(x, pieces[0], *(piece.contiguous() for piece in pieces[1:]))

    def live(self, x: Tensor) -> Tensor:
        """From one sample that is 0 only where all are."""
        return super().live((_batched(x, self.dims) != 0).any(dim=0, keepdim=True).to(x.dtype))

    def chunks(self, x: Tensor, rows: int = CHUNK) -> Sequence[Tensor]:
        batched = _batched(x, self.dims)
        positions = max(1, batched[0, 0].numel())  # about one row per position of the input
        return torch.split(batched, max(1, rows // positions))


class ConvolutionMap(_SpatialMap):
    """Convolution in 1 to 3 dimensions: one row per output position, one basis per group.

    A row is the patch of the padded input under the kernel, in the order of the weight's axes
    (channel, then kernel axes): the paper's equation (9), where the row of sample ``i`` at output
    position ``p`` is that of ``X_{l-1,i}``. Tangents and cotangents travel by convolutions, so
    patches are only formed for the basis.
    """

    functions = (functional.conv1d, functional.conv2d, functional.conv3d)

    @property
    def key(self) -> tuple[Any, ...]:
        m = self.module
        return (*super().key, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)

    def compute(self, x: Tensor) -> Tensor:
        z: Tensor = self.module._conv_forward(x, self.module.weight, self.module.bias)
        return z

    def rows(self, x: Tensor, bias_input: float = 1.0) -> Tensor:
        patches = self.padded(_batched(x, self.dims))
        sizes = zip(self.module.kernel_size, self.module.stride, self.module.dilation, strict=True)
        for axis, (size, stride, dilation) in enumerate(sizes, start=2):
            patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        rows = _grouped(patches, self.groups, axes=self.dims)
        return with_bias_column(rows, bias_input, self.has_bias_column)

    def _sizes(self) -> tuple[int, int]:
        return self.shape[0] // self.groups, self.shape[1:].numel()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        weight = tensors[0].reshape(self.groups, self.shape[0] // self.groups, -1)
        pieces = [weight, *(t.reshape(self.groups, -1, 1) for t in tensors[1:])]
        matrix = torch.cat(pieces, dim=2)
        return matrix[0] if self.groups == 1 else matrix

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        if not self.has_bias_column:
            return (matrix.reshape(self.shape),)
        return matrix[..., :-1].reshape(self.shape), matrix[..., -1].reshape(-1)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        m = self.module
        taken, zeros = self._taken(x)
        z: Tensor = self._conv(taken, weight, bias, m.stride, zeros, m.dilation, m.groups)
        return z if x.dim() == self.dims + 2 else z[0]

    def row_norms(self, x: Tensor) -> Tensor:
        """By a convolution of the squares with ones: no patch is formed."""
        taken, zeros = self._taken(x)
        squares = taken.square().unflatten(1, (self.groups, -1)).sum(2)
        m = self.module
        ones = squares.new_ones(self.groups, 1, *m.kernel_size)
        sums = self._conv(squares, ones, None, m.stride, zeros, m.dilation, m.groups)
        rows = _grouped(sums, self.groups, axes=0)[..., 0] + float(self.has_bias_column)
        return rows.sqrt()

    def pull(self, delta: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        (taken, zeros), carry = self._taken(x), None
        if taken.shape != _batched(x, self.dims).shape:
            taken, carry = carried_back(self.padded, _batched(x, self.dims))
        (grad,) = self._backward(delta, taken, zeros, weight, (True, False, False))
        return (grad if carry is None else carry(grad)).reshape(x.shape)

    def weight_gradient(self, x: Tensor, delta: Tensor, bias_input: float = 1.0) -> Tensor:
        weight = self.module.weight.detach().to(delta.dtype)
        wanted = (False, True, self.has_bias_column)
        pieces = self._backward(delta, *self._taken(x), weight, wanted)
        return self.join([pieces[0], *(bias_input * grad for grad in pieces[1:])])

    def _backward(
        self,
        delta: Tensor,
        taken: Tensor,
        zeros: Sequence[int],
        weight: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> list[Tensor]:
        """Gradients of the convolution of what it takes: those wanted of input, weight, bias."""
        m = self.module
        grads: list[Tensor] = torch.ops.aten.convolution_backward(
            _batched(delta, self.dims), taken, weight, [weight.shape[0]],
            m.stride, zeros, m.dilation, False, [0] * self.dims, m.groups, wanted,
        )  # fmt: skip
        return [grad for grad, asked in zip(grads, wanted, strict=True) if asked]

    def padded(self, x: Tensor) -> Tensor:
        """The input with the padding of the module's mode."""
        widths, mode = self._widths(), self.module.padding_mode
        if not any(widths):
            return x
        return functional.pad(x, widths, mode="constant" if mode == "zeros" else mode)

    def _taken(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """A batch as a convolution takes it, and the zeros that it puts around it by itself.

        It does so without a copy of the input, but only the same number on both sides.
        """
        x, widths = _batched(x, self.dims), self._widths()
        before, after = widths[::-2], widths[-2::-2]
        if self.module.padding_mode == "zeros" and before == after:
            return x, before
        return self.padded(x), [0] * self.dims

    def _widths(self) -> list[int]:
        """How much is put around the input: last axis first, before and after, as `pad` has it."""
        m = self.module
        widths: list[int] = []
        for axis in reversed(range(self.dims)):
            if m.padding == "same":
                total = m.dilation[axis] * (m.kernel_size[axis] - 1)
                widths += [total // 2, total - total // 2]
            else:
                widths += [0, 0] if m.padding == "valid" else [m.padding[axis]] * 2
        return widths


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(LayerRule[Any]):
    """Convolution with any stride, padding (every mode), dilation and groups; equation (9)."""

    kind = "Conv"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        return [ConvolutionMap(module)]


class TransposedConvolutionMap(_SpatialMap):
    """Transposed convolution in 1 to 3 dimensions: one row per output position, per group.

    It is a convolution with stride 1 of the input with zeros between its entries; a row is the
    patch of that under the flipped kernel, in the order of the weight's axes.
    """

    functions = (
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )

    @property
    def key(self) -> tuple[Any, ...]:
        m = self.module
        return (*super().key, m.stride, m.padding, m.output_padding, m.dilation, m.groups)

    def compute(self, x: Tensor) -> Tensor:
        return self._apply(x, self.module.weight, self.module.bias)

    def rows(self, x: Tensor, bias_input: float = 1.0) -> Tensor:
        m, patches = self.module, _batched(x, self.dims)
        for axis in range(self.dims):
            reach = m.dilation[axis] * (m.kernel_size[axis] - 1)
            before = reach - cast(int, m.padding[axis])
            patches = _spread(patches, 2 + axis, m.stride[axis])
            after = before + m.output_padding[axis]
            patches = functional.pad(patches, _one_axis(before, after, self.dims, axis))
        for axis in range(self.dims):
            reach = m.dilation[axis] * (m.kernel_size[axis] - 1)
            patches = patches.unfold(2 + axis, reach + 1, 1)[..., :: m.dilation[axis]].flip(-1)
        rows = _grouped(patches, self.groups, axes=self.dims)
        return with_bias_column(rows, bias_input, self.has_bias_column)

    def _sizes(self) -> tuple[int, int]:
        return self.shape[1], self.shape[0] // self.groups * self.shape[2:].numel()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        weight = tensors[0].reshape(self.groups, -1, self.shape[1], self.shape[2:].numel())
        matrix = weight.movedim(2, 1).flatten(2)
        pieces = [matrix, *(t.reshape(self.groups, -1, 1) for t in tensors[1:])]
        joined = torch.cat(pieces, dim=2)
        return joined[0] if self.groups == 1 else joined

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        inputs = self.shape[0] // self.groups
        width = inputs * self.shape[2:].numel()
        upright = matrix[..., :width].reshape(self.groups, self.shape[1], inputs, -1)
        weight = upright.movedim(1, 2).reshape(self.shape)
        return (weight, matrix[..., -1].reshape(-1)) if self.has_bias_column else (weight,)

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        m = self.module
        z: Tensor = self._conv(
            x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation
        )
        return z


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(LayerRule[Any]):
    """Any stride, padding, dilation and groups; a call with ``output_size`` freezes the layer."""

    kind = "ConvTranspose"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        return [TransposedConvolutionMap(module)]

    def forward(self, module: Any, apply: Any, x: Tensor, output_size: Any = None) -> Any:
        if output_size is None:
            return apply("", x)
        return type(module).forward(module, x, output_size)


def _spread(x: Tensor, axis: int, stride: int) -> Tensor:
    """``x`` with ``stride - 1`` zeros between its entries along an axis."""
    if stride == 1:
        return x
    stuffed = torch.stack([x, *[torch.zeros_like(x)] * (stride - 1)], dim=axis + 1)
    return stuffed.flatten(axis, axis + 1).narrow(axis, 0, (x.shape[axis] - 1) * stride + 1)


def _one_axis(before: int, after: int, dims: int, axis: int) -> list[int]:
    """Padding widths for `functional.pad` on one of ``dims`` trailing axes."""
    widths = [0] * (2 * dims)
    widths[2 * (dims - 1 - axis) : 2 * (dims - axis)] = [before, after]
    return widths


def _batched(x: Tensor, dims: int) -> Tensor:
    return x if x.dim() == dims + 2 else x[None]


def _ungrouped(rows: Tensor, groups: int, like: Tensor, dims: int) -> Tensor:
    """Rows ``[*groups, rows, channels]`` in the shape of an output, channels first."""
    batched = _batched(like, dims)
    flat = rows if groups == 1 else rows.movedim(0, 1).flatten(1)
    spread = flat.reshape(len(batched), *batched.shape[2:], batched.shape[1])
    return spread.movedim(-1, 1).reshape(like.shape)


def _grouped(x: Tensor, groups: int, axes: int) -> Tensor:
    """``[samples, groups * c, *positions, *k]`` as ``[*groups, samples * positions, c * k]``.

    ``axes`` is the number of trailing axes ``k``; the group axis is left out if there is one group.
    """
    samples, channels = x.shape[:2]
    split = x.reshape(samples, groups, channels // groups, *x.shape[2:])
    end = split.dim() - axes
    rows = split.movedim(1, 0)  # groups, samples, channels, positions, k
    rows = rows.movedim(2, end - 1)  # groups, samples, positions, channels, k
    rows = rows.reshape(groups, -1, rows.shape[end - 1 :].numel())
    return rows[0] if groups == 1 else rows
