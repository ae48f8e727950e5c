"""Low-rank adapters that cannot be seen on old data, whatever is learned in them.

An adapter adds ``s B A x`` to a layer's output. With the rows of ``A`` orthogonal to all old inputs
``A x = 0`` there, for any ``B``. So ``A`` is put into the null space once and frozen, and ``B`` is
trained as ever. The adapter has no bias: of the space of the inputs with their 1 it must leave the
inputs' own part alone.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teleport.errors import NullSpaceError
from teleport.subspace import Basis, Projector

_HOW = "Make the space of the model before the adapters are added"


def lora_(bases: Mapping[str, Projector], model: nn.Module) -> dict[str, int]:
    """Put the rows of every active adapter's ``A`` into the null space, and freeze them.

    Args:
        bases: of the model without adapters, by name.
        model: with adapters, as of PEFT, that have learned nothing.

    Returns:
        How many input directions each adapter may use, by the name of its layer.
    """
    found = list(_adapters(model))
    if not found:
        raise NullSpaceError(
            f"{type(model).__name__} has no active low-rank adapter (no module with lora_A); add "
            "them first, as by peft.get_peft_model"
        )
    _require_nothing_else_trains(model, found)
    projected = [(adapter, *adapter.projected(bases)) for adapter in found]
    free = {adapter.name: count for adapter, _, count in projected}
    if not any(free.values()):
        raise NullSpaceError(
            "no adapter has a direction left that the old data do not use: none could learn "
            "anything. Make the space at a smaller tau"
        )
    for adapter, rows, _ in projected:
        with torch.no_grad():
            adapter.a.copy_(rows)
        adapter.freeze()
    return free


class _Adapter:
    """The two factors of one low-rank adapter.

    Attributes:
        name: of its layer in the model without adapters.
        key: which adapter of that layer.
        layer: the adapted one.
        a, b: its factors; ``a`` is ``[r, *inputs]``.
    """

    def __init__(self, name: str, key: str, layer: Any) -> None:
        self.name, self.key, self.layer = name, key, layer
        self.a, self.b = layer.lora_A[key].weight, layer.lora_B[key].weight

    def freeze(self) -> None:
        """Train ``b`` alone, also after PEFT has made all factors of an active adapter trainable.

        It does so when an adapter is chosen, or has been disabled for a while.
        """
        self.layer.register_forward_pre_hook(partial(_freeze, key=self.key))
        self.a.requires_grad_(False)

    def projected(self, bases: Mapping[str, Projector]) -> tuple[Tensor, int]:
        """Rows of the null space of the lengths of those of ``a``, and its dimension."""
        if parts := [name for name in bases if name.startswith(f"{self.name}.")]:
            raise NullSpaceError(
                f"layer {self.name!r} has one adapter for {', '.join(parts)}, each of which has a "
                "null space of its own: attention in one module cannot have such an adapter. Use "
                "attach(), or adapters on linear layers"
            )
        if self.name not in bases:
            raise NullSpaceError(
                f"layer {self.name!r} has an adapter and no part in this null space. {_HOW}, with "
                f"that layer included. In the space are: {', '.join(bases)}"
            )
        rows = self.a.detach().double().flatten(1)
        locked, free = _locked(self.name, bases[self.name], rows.shape[1])
        locked = locked.to(rows)
        if bool(self.b.detach().any()):
            if bool((rows @ locked).norm() <= torch.finfo(self.a.dtype).eps * rows.norm()):
                return self.a.detach(), free  # it is there already, as one that was loaded
            raise NullSpaceError(
                f"the adapter of layer {self.name!r} is not new: its B is not 0, so that another A "
                "would change what the model does now"
            )
        moved = rows - (rows @ locked) @ locked.mT
        moved -= (moved @ locked) @ locked.mT
        length, wanted = (r.norm(dim=1, keepdim=True) for r in (moved, rows))
        moved = torch.where(length > 1e-9 * wanted, moved * (wanted / length), 0.0)
        return (moved if free else torch.zeros_like(rows)).view_as(self.a), free


def _locked(name: str, basis: Projector, width: int) -> tuple[Float[Tensor, "inputs kept"], int]:
    """Orthonormal directions of the old inputs, their 1 left out, and how many others there are."""
    if isinstance(basis, Basis) and basis.shape in ((width,), (width + 1,)):
        if not basis.null_dim:
            return torch.eye(width, device=basis.device), 0
        # The inputs' span is that of the rows with their 1, the 1 dropped: all its singular values
        # are 1 but at most one, which is 0 if the 1 alone was in the span.
        left, sizes, _ = torch.linalg.svd(basis.vectors[:width], full_matrices=False)
        own = left[:, sizes > width * torch.finfo(torch.float64).eps]
        return own, width - own.shape[1]
    raise NullSpaceError(
        f"the adapter of layer {name!r} has {width} inputs, the null space there is of shape "
        f"{basis.shape}. {_HOW}; grouped and tied layers cannot have such an adapter"
    )


def _adapters(model: nn.Module) -> Iterator[_Adapter]:
    """The active adapters, by PEFT's names for them; the package need not be installed."""
    for name, module in model.named_modules():
        a, b = (getattr(module, table, None) for table in ("lora_A", "lora_B"))
        if not (isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict)):
            continue
        active = getattr(module, "active_adapters", list(a))
        for key in (key for key in a if key in active):
            yield _Adapter(name.removeprefix("base_model.model."), key, module)


def _freeze(layer: Any, _: Any, *, key: str) -> None:
    if key in layer.lora_A and layer.lora_A[key].weight.requires_grad:  # it may have been deleted
        layer.lora_A[key].weight.requires_grad_(False)


def _require_nothing_else_trains(model: nn.Module, found: list[_Adapter]) -> None:
    """Raise NullSpaceError if an optimizer could change the old function all the same."""
    factors = {id(p) for adapter in found for p in (adapter.a, adapter.b)}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    if others:
        raise NullSpaceError(
            f"{', '.join(others[:5])}{' and others' * (len(others) > 5)} would be trained, too, "
            "and change the old function. Freeze them: of LoraConfig bias='none', "
            "lora_bias=False, use_dora=False, no modules_to_save and no embedding as a target"
        )
