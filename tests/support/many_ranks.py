"""What four ranks do in `test_many_ranks.py`: all, three or two of them, as DDP and as FSDP2.

Four processes are started once. The reference is one process with a list of closures, one for each
shard: its products have the same shapes, so that results can be the same to the last bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from teleport import Teleporter, null_space, supported
from teleport.rivals import RandomNullDirection
from tests.support.ranks import (
    CASES,
    Found,
    TroubleError,
    batch,
    build,
    error_of,
    loss_of,
    run_scenarios,
    told,
)

SIZE = 4
SHARDS = {"four": [6, 6, 6, 6], "uneven": [9, 3, 7, 5], "three": [1, 13, 10], "two": [12, 12]}
CHOSEN = {
    "perceptron": ("perceptron", torch.float64, {}),
    "perceptron, fixed steps": CASES[12],
    "perceptron, double backward": ("perceptron", torch.float64, {"method": "double_backward"}),
    "convolution, tau": ("convolution", torch.float64, {"tau": 0.95, "max_drift": 1.0}),
    "tokens": ("tokens", torch.float64, {}),
    "sequences, tau": ("sequences", torch.float64, {"tau": 0.95, "max_drift": 1.0}),
    "single precision": ("perceptron", torch.float32, {}),
    "sequences, tau, single precision": CASES[15],
}
"""Rows below, above and around d_in on a rank; weights used twice, layers called several times."""

PAIRS = [
    *(("four", name) for name in CHOSEN),
    *(("uneven", name) for name in list(CHOSEN)[::2]),
    *(("three", name) for name in list(CHOSEN)[1::2]),
]
"""Of `SHARDS` and `CHOSEN`: what is done."""

SHARDED = ("perceptron", "tokens", "sequences, tau, single precision")


def closures(model: nn.Module, name: str, sizes: Sequence[int]) -> list[Callable[[], Tensor]]:
    """One for each shard."""
    x, y = batch(CHOSEN[name][1])
    pieces = zip(x.split(sizes), y.split(sizes), strict=True)
    return [loss_of(model, a, b) for a, b in pieces]


def one_process(name: str, sizes: Sequence[int]) -> Found:
    """What is expected of ranks with these shards."""
    kind, dtype, settings = CHOSEN[name]
    model = build(kind, dtype)
    teleporter = Teleporter(model, **({"growth": 2.0} | settings))
    return told(model, teleporter.step(closures(model, name, sizes)))


def replicated(rank: int, name: str, sizes: Sequence[int], group: Any) -> Found:
    kind, dtype, settings = CHOSEN[name]
    model = DistributedDataParallel(build(kind, dtype), process_group=group)
    teleporter = Teleporter(model, **({"growth": 2.0} | settings))
    return told(model, teleporter.step(closures(model, name, sizes)[rank]))


# -- FSDP2 -----------------------------------------------------------------------------------------


def spread(model: nn.Module, mesh: DeviceMesh, **policy: Any) -> nn.Module:
    """Layers on their own if none shares a weight, and the whole."""
    for layer in model.children() if isinstance(model, nn.Sequential) else ():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def whole(model: nn.Module) -> Tensor:
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])


def local(model: nn.Module) -> list[Tensor]:
    """This rank's rows of the weights and of their gradients."""
    grads = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    return [t.clone() for t in [*(p.to_local() for p in model.parameters()), *grads]]


def state_of(model: nn.Module) -> Any:
    """What else FSDP2 and a teleport put a hand on."""
    modules = [(type(m), m.training, len(m._forward_hooks)) for m in model.modules()]
    return modules, [buffer.tolist() for buffer in model.buffers()], torch.get_rng_state().tolist()


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sharded(rank: int, name: str, mesh: DeviceMesh) -> Found:
    """A teleport between two steps of training; the model stands there whole when it begins."""
    kind, dtype, settings = CHOSEN[name]
    model = spread(build(kind, dtype), mesh)
    loss = closures(model, name, SHARDS["two"])[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss().backward()
    gradients = [p.grad.to_local().clone() for p in model.parameters()]
    names, classes = [n for n, _ in model.named_parameters()], [type(m) for m in model.modules()]
    with torch.no_grad():
        loss()  # after it the outermost module is not sharded again
    report = Teleporter(model, **({"growth": 2.0} | settings)).step(loss)
    after = whole(model)
    kept = all_equal(gradients, [p.grad.to_local() for p in model.parameters()])
    same = [n for n, _ in model.named_parameters()] == names
    optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    return {
        "report": report.to_dict() | {"seconds": 0.0},
        "parameters": after,
        "as FSDP2": kept and same and [type(m) for m in model.modules()] == classes,
        "trained": torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]),
    }


def trained_in_one(name: str) -> tuple[Found, Tensor]:
    """What `sharded` finds, and the gradient behind its step of training, in one process."""
    kind, dtype, settings = CHOSEN[name]
    model = build(kind, dtype)
    parts = closures(model, name, SHARDS["two"])

    def backward() -> None:
        for part in parts:
            (part() / len(parts)).backward()

    backward()
    report = Teleporter(model, **({"growth": 2.0} | settings)).step(parts)
    found = told(model, report)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    backward()
    return found, torch.cat([p.grad.flatten() for p in model.parameters()])


def sharded_in_trouble(rank: int, mesh: DeviceMesh) -> Found:
    """Rank 1's closure raises at its fourth call; and a teleport that drifts too far."""
    model = spread(build("perceptron"), mesh)
    x, y = (t.chunk(2)[rank] for t in batch())
    loss_of(model, x, y)().backward()
    calls = 0

    def fails() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 4:
            raise TroubleError("no more data")
        return loss_of(model, x, y)()

    start, state = local(model), state_of(model)
    error = error_of(lambda: Teleporter(model).step(fails))
    as_before = all_equal(start, local(model)) and state_of(model) == state
    report = Teleporter(model, tau=0.5, growth=3.0, max_drift=1e-12).step(loss_of(model, x, y))
    return {
        "error": error,
        "as before": as_before,
        "rolled back": report.rolled_back and all_equal(start, local(model)),
    }


def refused(rank: int, mesh: DeviceMesh) -> Found:
    """Other ways to spread a model over two ranks, and other things to do with one of FSDP2."""
    fsdp2 = spread(build("perceptron"), mesh)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    partly = nn.Sequential(fully_shard(nn.Linear(9, 9), mesh=mesh), nn.Linear(9, 3))
    tensor = parallelize_module(build("perceptron"), mesh, {"3": ColwiseParallel()})
    hooked = spread(build("perceptron"), mesh)
    hooked[3].weight.register_hook(lambda grad: grad)
    flat = FullyShardedDataParallel(
        nn.Linear(9, 9), process_group=mesh.get_group(), device_id=torch.device("cpu")
    )
    adam = torch.optim.Adam(fsdp2.parameters())
    model = {"objective": "preconditioned", "optimizer": adam}
    return {
        "space": error_of(lambda: null_space(fsdp2, [lambda: fsdp2(batch()[0])])),
        "supported": error_of(lambda: supported(fsdp2)),
        "rival": error_of(lambda: RandomNullDirection(fsdp2)),
        "optimizer": error_of(lambda: Teleporter(fsdp2, **model)),
        "mixed": error_of(lambda: Teleporter(spread(build("perceptron"), mesh, mp_policy=half))),
        "partly": error_of(lambda: Teleporter(partly)),
        "hooked": error_of(lambda: Teleporter(hooked)),
        "tensor": error_of(lambda: Teleporter(tensor)),
        "tensor, space": error_of(lambda: null_space(tensor, [lambda: tensor(batch()[0])])),
        "flat": error_of(lambda: Teleporter(flat)),
    }


def two_dimensions() -> tuple[str, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    return error_of(lambda: Teleporter(spread(build("perceptron"), mesh)))


def scenarios(rank: int) -> dict[str, Callable[[], Any]]:
    """What this rank does, in this order; all ranks make all groups."""
    three, two = (distributed.new_group(range(size)) for size in (3, 2))
    groups = {"four": None, "uneven": None, "three": three}
    found: dict[str, Callable[[], Any]] = {}
    for shards, name in PAIRS:
        if rank < len(SHARDS[shards]):
            found[f"{shards}, {name}"] = lambda s=shards, n=name: replicated(
                rank, n, SHARDS[s], groups[s]
            )
    found["two dimensions"] = two_dimensions
    if rank < 2:
        mesh = DeviceMesh.from_group(two, "cpu")
        found |= {f"sharded, {name}": lambda n=name: sharded(rank, n, mesh) for name in SHARDED}
        found["trouble"] = lambda: sharded_in_trouble(rank, mesh)
        found["refused"] = lambda: refused(rank, mesh)
    return found


def run(rank: int, folder: str) -> None:
    run_scenarios(rank, folder, SIZE, scenarios)
