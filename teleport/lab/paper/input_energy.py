"""How much of its input energy a layer has in few directions (paper Figure 6a).

The squared singular values of a layer's input rows are the eigenvalues of their Gram matrix. Their
cumulated shares tell how much of the energy (the squared Frobenius norm; the paper's "input
variance", not centred) the leading eigenvectors capture, and so how many directions a threshold τ
leaves free.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from teleport.keeping.null_space import null_space
from teleport.lab.paper.snapshot import Moment, moment
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder, read_records
from teleport.lab.records.runs import FloatArray
from teleport.lab.records.writer import RecordWriter
from teleport.layers.one_hot import AxisBasis
from teleport.layers.shared_weight import TiedBasis
from teleport.subspace import Basis, Projector

FIGURE_TAUS = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5)
"""The thresholds of the paper's Figure 6."""


@dataclass(frozen=True)
class Spectrum:
    """The input energy of one weight matrix on one batch.

    Attributes:
        layer: its name; matrices of a grouped layer are numbered, ``"conv[0]"``, and both uses of
            a tied weight are told apart, ``"embed (other use)"``.
        d_in: input width, the bias column included.
        shares: of the energy, one per eigenvector that has any, largest first; they add up to 1.
        ranks: by τ, the directions that `teleport.null_space` keeps.
    """

    layer: str
    d_in: int
    shares: tuple[float, ...]
    ranks: dict[float, int]

    @property
    def captured(self) -> FloatArray:
        """``[k]``: the share of the energy that the 1, 2, ... leading eigenvectors capture."""
        return np.minimum(np.cumsum(np.array(self.shares, dtype=np.float64)), 1.0)


def spectra(
    model: nn.Module, closure: Callable[[], Any], taus: Sequence[float] = FIGURE_TAUS
) -> list[Spectrum]:
    """The spectra of all covered layers of a model, with ranks for thresholds in (0, 1].

    The closure runs the model on a batch; what it returns does not matter.

    Raises:
        ValueError: if a threshold is out of range.
        UnsupportedModelError: if the model has no covered layer.
        ClosureError: if the closure calls none.
    """
    whole = list(_matrices(model, closure, 1.0))
    ranks = {tau: [rank for *_, rank in _matrices(model, closure, tau)] for tau in taus}
    return [
        Spectrum(name, d_in, _shares(energies), {tau: ranks[tau][i] for tau in taus})
        for i, (name, d_in, energies, _) in enumerate(whole)
    ]


def _matrices(
    model: nn.Module, closure: Callable[[], Any], tau: float
) -> Iterator[tuple[str, int, Tensor, int]]:
    """Name, input width, energies and rank of every matrix."""
    for name, basis in null_space(model, [closure], tau).bases.items():
        yield from _of_basis(name, basis)


def _of_basis(name: str, basis: Projector) -> Iterator[tuple[str, int, Tensor, int]]:
    if isinstance(basis, TiedBasis):
        yield from _of_basis(name, basis.own)
        yield from _of_basis(f"{name} (other use)", basis.other)
    elif isinstance(basis, AxisBasis):
        yield name, len(basis.counts), basis.counts, basis.rank
    elif isinstance(basis, Basis):
        *groups, d_in = basis.shape
        energies = basis.singular_values.square().reshape(basis.ranks.numel(), -1)
        ranks = basis.ranks.flatten().tolist()
        for number, (energy, rank) in enumerate(zip(energies, ranks, strict=True)):
            yield f"{name}[{number}]" if groups else name, d_in, energy, rank
    else:
        raise TypeError(f"no spectrum is known of the {type(basis).__name__} of {name!r}")


def _shares(energies: Tensor) -> tuple[float, ...]:
    """Shares of the sum, largest first; none if nothing was collected."""
    ordered = energies.double().sort(descending=True).values
    ordered = ordered[ordered > 0]
    return tuple((ordered / ordered.sum()).tolist())


def write_spectra(
    names: Sequence[str],
    out: RecordFolder,
    *,
    preset: str = "cpu",
    steps: Sequence[int] = (0, 50),
    seed: int = 0,
) -> None:
    """Record the spectra of named experiments after some training steps, one file each.

    Errors as of `moment` and `RecordFolder`.
    """
    asked = {"preset": preset, "seed": seed, "steps": list(steps)}
    with out.held("spectrum", asked, added=asked):
        for order, name in enumerate(names):
            path = out.missing(f"{order:02d}-{slug(name)}", {"experiment": name})
            if path is None:
                continue
            with out.writing(path) as writer:
                for number, count in enumerate(steps):
                    out.progress(f"{name} after {count} steps")
                    at = moment(name, preset, count, seed)
                    if number == 0:
                        shared = {"command": out.command, "order": order, "figure": "spectrum"}
                        writer.write("config", **shared, **(asked | at.config))
                    _write(writer, at, count)


def _write(writer: RecordWriter, at: Moment, count: int) -> None:
    for s in spectra(at.model, at.closure):
        ranks = {f"{tau:g}": rank for tau, rank in s.ranks.items()}
        row = {"layer": s.layer, "d_in": s.d_in, "ranks": ranks, "shares": s.shares}
        writer.write("spectrum", step=count, **row)


@dataclass(frozen=True)
class Measured:
    """The record of one experiment: its configuration, and spectra by training steps."""

    config: dict[str, Any]
    by_step: dict[int, list[Spectrum]]


def read_spectra(folder: Path) -> list[Measured]:
    """The spectra that a folder holds, in the order asked for; errors as of `read_records`."""
    found = []
    kept = read_records(folder, "spectrum", "spectra", row="spectrum", unfinished=True)
    for _, config, rows in kept:
        by_step: dict[int, list[Spectrum]] = {}
        for row in (row for row in rows if row["type"] == "spectrum"):
            ranks = {float(tau): rank for tau, rank in row["ranks"].items()}
            spectrum = Spectrum(row["layer"], row["d_in"], tuple(row["shares"]), ranks)
            by_step.setdefault(row["step"], []).append(spectrum)
        found.append(Measured(config, by_step))
    return found
