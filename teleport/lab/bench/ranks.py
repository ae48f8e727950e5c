"""What ranks of `DistributedDataParallel` send during one teleport: counted, and by formula.

Bytes are those that a rank takes in: of r ranks, (r - 1)/r of the numbers for each half of a sum
(`teleport.runtime.ranks.Group`), the others' rows, and the whole of what the first rank tells. They
are the same on every machine. Memory is that of tensors at their peak; seconds are left out, for
processes that share one machine's cores tell nothing of a cluster.
"""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from teleport.errors import RunError
from teleport.lab.bench.timing import Measurement, peak_bytes
from teleport.lab.experiments.models import mlp
from teleport.report import TeleportReport
from teleport.runtime.ranks import Group
from teleport.teleporter import Teleporter

COUNTS = (1, 2, 4)
"""Of processes."""

PURPOSES = ("gradients", "inputs", "bases", "directions")
"""Of what travels."""


@dataclass(frozen=True)
class Traffic:
    """A perceptron that ranks teleport together.

    Attributes:
        widths: of the input, the hidden layers and the output.
        rows: samples in all ranks together.
    """

    widths: tuple[int, ...]
    rows: int
    tau: float


def cases(small: bool) -> list[Traffic]:
    """Fewer rows than inputs of a layer, at τ = 1; and more, so that Gram matrices travel."""
    paper = (784, 1024, 1024, 10)
    widths, few, many = ((20, 32, 32, 4), 8, 64) if small else (paper, 200, 2048)
    return [Traffic(widths, few, 1.0), Traffic(widths, many, 0.9)]


@dataclass(frozen=True)
class LayerSize:
    """What of a layer decides how much travels.

    Attributes:
        d_out, d_in: of the weight with its bias.
        rank: of its inputs; None where no basis is made, because they depend on no parameter.
    """

    d_out: int
    d_in: int
    rank: int | None


def predicted(
    ranks: int, layers: Sequence[LayerSize], rows: int, parameters: int, looks: int
) -> dict[str, float]:
    """Bytes that a rank other than the first takes in, in single precision, by purpose.

    ``rows`` are those of the inputs of each layer in all ranks together, ``parameters`` the
    trainable numbers in the model, and ``looks`` those at a gradient norm.
    """
    share, told = (ranks - 1) / ranks, int(ranks > 1)
    found = dict.fromkeys(PURPOSES, 0.0)
    found["gradients"] = 2 * share * 4 * parameters * looks
    for layer in layers:
        height = rows if rows <= layer.d_in else 2 * layer.d_in
        found["inputs"] += share * 8 * height * layer.d_in
        if layer.rank is not None:
            values = min(rows, layer.d_in)
            found["bases"] += told * 8 * (layer.d_in * layer.rank + values + 1)
            if layer.rank < layer.d_in:
                found["directions"] += (2 * share + told) * 4 * layer.d_out * layer.d_in
    return found


def measured(case: Traffic, ranks: int) -> Measurement:
    """Teleport in so many processes; the counts of the last rank, and the largest peak."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, case, folder), nprocs=ranks)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    row = found[-1] | {"peak": max(each["peak"] for each in found)}
    layers = [LayerSize(**layer) for layer in row["layers"]]
    expected = predicted(ranks, layers, case.rows, row["parameters"], row["looks"])
    return {"ranks": ranks, **asdict(case), **row, "predicted": expected}


def _rank(rank: int, size: int, case: Traffic, folder: str) -> None:
    """One process: teleport twice, for the counts and for the peak, and leave what was found."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", meeting, rank=rank, world_size=size)
    parameters, step = _teleport(rank, size, case)
    with _counted(parameters) as (taken, calls):
        report = step()
    if report.steps != 1 or report.rolled_back:
        raise RunError(f"the teleport whose bytes are counted was none: {report.reason}")
    found = {
        "layers": [
            asdict(LayerSize(layer.d_out, layer.d_in, layer.rank))
            for layer in report.layers
            if layer.d_in is not None and layer.d_out is not None
        ],
        "parameters": parameters,
        "looks": calls["looks"],
        "exchanges": calls["exchanges"],
        "taken": {kind: taken[kind] for kind in (*PURPOSES, "other")},
        "peak": peak_bytes(_teleport(rank, size, case)[1], torch.device("cpu")),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _teleport(rank: int, size: int, case: Traffic) -> tuple[int, Callable[[], TeleportReport]]:
    """How many numbers a model has, and a teleport of it on this rank's shard; always the same."""
    torch.manual_seed(0)
    model = mlp(case.widths[0], case.widths[-1], case.widths[1:-1])
    x = torch.randn(case.rows, case.widths[0]).chunk(size)[rank]
    y = torch.randint(case.widths[-1], (case.rows,)).chunk(size)[rank]
    whole = DistributedDataParallel(model)
    drift = None if case.tau == 1.0 else math.inf
    teleporter = Teleporter(whole, tau=case.tau, max_drift=drift)
    count = sum(parameter.numel() for parameter in model.parameters())
    return count, lambda: teleporter.step(lambda: cross_entropy(whole(x), y))


_TAKEN: dict[str, tuple[int, Callable[[int], float]]] = {
    "all_reduce": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "all_to_all_single": (1, lambda ranks: (ranks - 1) / ranks),
    "all_gather": (1, lambda ranks: ranks - 1),
    "broadcast": (0, lambda ranks: 1),
}
"""By the name of a collective: which argument is the tensor, and how often it enters a rank."""


def _kind(method: str, given: Any, parameters: int) -> str:
    """What a call of a method of `Group` is for."""
    if method == "sum_" or (method == "gather" and given.dim() > 1):
        return "inputs"
    if method == "mean_":
        return "gradients" if sum(t.numel() for t in given) == parameters else "directions"
    if method == "of_first_" and max(t.dim() for t in given) > 1:
        return "bases" if any(not t.is_floating_point() for t in given) else "directions"
    return "other"


@contextmanager
def _counted(parameters: int) -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Bytes that this rank takes in by purpose; looks and exchanges."""
    taken, calls, kind = Counter[str](), Counter[str](), ["other"]

    def counting(name: str) -> Callable[..., Any]:
        place, times = _TAKEN[name]
        original = getattr(distributed, name)

        def collective(*given: Any, **named: Any) -> Any:
            calls["exchanges"] += 1
            size = given[place].numel() * given[place].element_size()
            taken[kind[0]] += round(times(distributed.get_world_size()) * size)
            return original(*given, **named)

        return collective

    def labelling(method: str) -> Callable[..., Any]:
        original = getattr(Group, method)

        def labelled(self: Group, given: Any) -> Any:
            before, kind[0] = kind[0], _kind(method, given, parameters)
            calls["looks"] += (method, kind[0]) == ("mean_", "gradients")
            try:
                return original(self, given)
            finally:
                kind[0] = before

        return labelled

    with ExitStack() as stack:
        for owner, names, made in (
            (distributed, _TAKEN, counting),
            (Group, ("mean_", "sum_", "gather", "of_first_", "_compare"), labelling),
        ):
            for name in names:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, made(name))
        yield taken, calls
