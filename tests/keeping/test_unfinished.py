"""A null space whose making was interrupted goes on where its file ends."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport import ClosureError, NullSpace, NullSpaceError, null_space
from teleport.keeping import leading, unfinished
from teleport.layers.shared_weight import TiedBasis
from teleport.subspace import Projector


class Words(nn.Module):
    """Tokens, two layers with the same inputs, another that some data do not reach, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.one, self.two, self.rare = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y = torch.tanh(self.one(x)) * self.two(x)
        return self.head(x + self.rare(y) if int(tokens[0]) % 2 else x)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "BETWEEN", 0.0)


@pytest.fixture
def model() -> Words:
    torch.manual_seed(3)
    return Words()


def closures(
    model: nn.Module, called: list[int], stop: int | None = None, count: int = 5
) -> Iterator[Callable[[], Any]]:
    """Each with four tokens of its own; one of them is interrupted."""
    for number in range(count):

        def closure(number: int = number) -> Tensor:
            if number == stop:
                raise KeyboardInterrupt
            called.append(number)
            return model((7 * number + torch.arange(4)) % 20)

        yield closure


def interrupted(model: nn.Module, file: Path, **settings: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        null_space(model, closures(model, [], stop=3), unfinished=file, **settings)


def tensors(space: NullSpace) -> dict[str, list[Tensor]]:
    def of(basis: Projector) -> list[Tensor]:
        if isinstance(basis, TiedBasis):
            return [*of(basis.own), *of(basis.other)]
        return [value for value in vars(basis).values() if isinstance(value, Tensor)]

    return {name: of(basis) for name, basis in space.bases.items()}


@pytest.mark.parametrize("tau", [0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_goes_on_to_the_same_bases(
    model: Words, tmp_path: Path, tau: float, dtype: torch.dtype
) -> None:
    model.to(dtype)
    file, called = tmp_path / "survey", []
    wanted = null_space(model, closures(model, []), tau)
    interrupted(model, file, tau=tau)
    found = null_space(model, closures(model, called), tau, unfinished=file)
    assert called == [3, 4]
    assert not list(tmp_path.iterdir()), "the file is gone"
    assert tensors(found).keys() == tensors(wanted).keys()
    for name, those in tensors(wanted).items():
        assert all(torch.equal(a, b) for a, b in zip(tensors(found)[name], those, strict=True))
    assert found.bases["one"] is found.bases["two"]
    assert found.frozen == wanted.frozen


@pytest.mark.parametrize(
    "change",
    ["weights", "layers", "bias", "mode", "kind", "fewer", "short", "empty", "other", "missing"],
)
def test_a_file_of_something_else_is_refused_and_stays(
    model: Words, tmp_path: Path, change: str
) -> None:
    file, called = tmp_path / "survey", []
    interrupted(model, file)
    settings: dict[str, Any] = {}
    match, count = "of another model, of other weights, modes or layers", 5
    if change == "weights":
        model.one.bias.data[0] += 1
    elif change == "layers":
        settings["include"] = ["one"]
    elif change == "bias":  # then its matrix has no column for it
        model.rare.bias.requires_grad_(False)
    elif change == "mode":
        model.eval()
    elif change == "kind":
        model.rare.__class__ = type("Other", (nn.Linear,), {})
    elif change == "fewer":
        match, count = "has taken in 3 closures, of which 2 were given", 2
    elif change == "short":
        match = "holds no unfinished survey"
        file.write_bytes(file.read_bytes()[:-500])
    elif change == "empty":  # an EOFError of PyTorch's
        match = "holds no unfinished survey"
        file.write_bytes(b"")
    elif change == "other":
        match = "holds no unfinished survey"
        torch.save({"of": {}, "done": Path("x")}, file)
    else:
        match = "holds no unfinished survey"
        torch.save({"of": {}}, file)
    before = file.read_bytes()
    with pytest.raises(NullSpaceError, match=match) as caught:
        null_space(model, closures(model, called, count=count), unfinished=file, **settings)
    assert "weights_only" not in str(caught.value)  # PyTorch's advice to do without
    assert called == []
    assert file.read_bytes() == before


def test_a_missing_folder_is_said_before_anything_is_taken_in(model: Words, tmp_path: Path) -> None:
    called: list[int] = []
    with pytest.raises(NullSpaceError, match="nowhere is no folder"):
        null_space(model, closures(model, called), unfinished=tmp_path / "nowhere" / "survey")
    assert called == []
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_said_before_anything_is_taken_in(
    model: Words, tmp_path: Path
) -> None:
    called: list[int] = []
    with pytest.raises(NullSpaceError, match=r"cannot be written to .*longer") as caught:
        null_space(model, closures(model, called), unfinished=tmp_path / ("longer" * 43))
    assert isinstance(caught.value.__cause__, OSError)
    assert called == []


@pytest.mark.parametrize("name", ["folder" * 50 + "/survey", "no\0name"])
def test_a_path_that_no_file_has_is_said_before_anything_is_taken_in(
    model: Words, tmp_path: Path, name: str
) -> None:
    called: list[int] = []
    with pytest.raises(NullSpaceError, match=r"cannot be written to|is no folder"):
        null_space(model, closures(model, called), unfinished=tmp_path / name)
    assert called == []
    assert not list(tmp_path.iterdir())


def test_a_name_may_be_as_long_as_the_folder_takes(model: Words, tmp_path: Path) -> None:
    file = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    interrupted(model, file)
    assert list(tmp_path.iterdir()) == [file]
    null_space(model, closures(model, []), unfinished=file).save(file)
    assert list(tmp_path.iterdir()) == [file]
    assert NullSpace.load(file).bases


@pytest.mark.parametrize("left", [0, 1000])
def test_a_disk_that_is_full_is_said_in_our_words(
    model: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """The file that was there stays, and nothing else does."""
    file, whole = tmp_path / "survey", torch.save
    interrupted(model, file)
    before = file.read_bytes()

    def full(state: object, path: Path) -> None:
        whole(state, path)
        path.write_bytes(path.read_bytes()[:left])
        raise RuntimeError("unexpected pos")  # as PyTorch's writer does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(NullSpaceError, match=r"cannot be written to .*survey: unexpected pos"):
        null_space(model, closures(model, []), unfinished=file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_buffers_of_any_form_are_part_of_the_model(model: Words, tmp_path: Path) -> None:
    forms = {
        "empty": torch.empty(0),
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.ones(3, dtype=torch.cfloat).conj(),
        "meta": torch.ones(3, device="meta"),
        "count": torch.tensor(3),
    }
    for name, tensor in forms.items():
        model.register_buffer(name, tensor)
    interrupted(model, tmp_path / "survey")
    goes_on = null_space(model, closures(model, []), unfinished=tmp_path / "survey")
    assert goes_on.bases.keys() == null_space(model, closures(model, [])).bases.keys()
    interrupted(model, tmp_path / "survey")
    model.sparse = 2 * model.sparse
    with pytest.raises(NullSpaceError, match="of other weights"):
        null_space(model, closures(model, []), unfinished=tmp_path / "survey")


def test_what_fails_before_anything_was_taken_in_leaves_no_file(
    model: Words, tmp_path: Path
) -> None:
    with pytest.raises(ClosureError):
        null_space(model, [], unfinished=tmp_path / "survey")
    assert not list(tmp_path.iterdir())


def test_a_file_of_rough_products_serves_no_larger_share(
    model: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "WIDE", 1)
    file, rough, exact = tmp_path / "survey", tmp_path / "rough", tmp_path / "exact"
    interrupted(model, rough, tau=0.9)
    shutil.copy(rough, file)
    with pytest.raises(NullSpaceError, match=r"survey is of layers whose tau was at most 0\.999"):
        null_space(model, closures(model, []), 1.0, unfinished=file)
    assert file.read_bytes() == rough.read_bytes()
    null_space(model, closures(model, []), 0.8, unfinished=file)
    interrupted(model, exact, tau=1.0)  # while the exact ones serve any
    null_space(model, closures(model, []), 0.9, unfinished=exact)
