"""Which layers and thresholds a space has, who shares a basis, other thresholds, its file."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teleport import NullSpace, NullSpaceError, null_space
from teleport.keeping import file
from tests.support.examples import examples
from tests.support.keeping import Learner
from tests.support.strategies import seeds

few = examples(8)
taus = st.floats(0.3, 1.0)


class Attention(nn.Module):
    """q, k and v of one input, gate and up of another; ``turn`` says who gets something else.

    ``k`` has no bias where ``k_bias`` is false. In place: the input of q is overwritten before k.
    """

    def __init__(self, turn: str = "", k_bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=b) for b in (True, k_bias, True))
        self.gate, self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)
        self.turn = turn

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        q = self.q(y)
        if self.turn == "in place":
            y.mul_(2.0)
        k = self.k(y.clone() if self.turn == "clone" else y)
        if self.turn == "twice":
            k = k + self.k(y + 1.0)
        v = k if self.turn == "skip" else self.v(y)
        z = x + q * k.sigmoid() + v
        return self.down(self.gate(z).tanh() * self.up(z))


def own_space(model: Attention, inputs: list[Tensor], tau: float) -> dict[str, Tensor]:
    """The kept projector of every layer, of its own rows, by singular value decomposition."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: rows.setdefault(name, []).append(args[0].detach().clone())
        )
        for name, module in model.named_children()
    ]
    for x in inputs:
        model(x)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, module in model.named_children():
        width = module.in_features + (module.bias is not None)
        pieces = [p.reshape(-1, module.in_features) for p in rows.get(name, [])]
        if not pieces:
            found[name] = torch.zeros(width, width, dtype=torch.float64)
            continue
        x = torch.cat(pieces)
        if module.bias is not None:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        _, values, right = torch.linalg.svd(x, full_matrices=False)
        rank = int((values > 1e-10 * values[0]).sum())
        energy = values.square().cumsum(0) / values.square().sum()
        if tau < 1.0:
            rank = min(rank, int((energy < tau).sum()) + 1)
        found[name] = right[:rank].T @ right[:rank]
    return found


TURNS = ["", "in place", "clone", "twice", "skip"]


@pytest.mark.parametrize("first", TURNS)
@few
@given(seed=seeds, second=st.sampled_from(TURNS), k_bias=st.booleans(), samples=st.integers(1, 9))
def test_shared_bases_are_those_of_each_layer_alone(
    first: str, seed: int, second: str, k_bias: bool, samples: int
) -> None:
    """However the inputs of the layers part, within a closure or from one to the next."""
    torch.manual_seed(seed)
    model = Attention(k_bias=k_bias).double()
    inputs = list(torch.randn(2, samples, 6, dtype=torch.float64))

    def closure(turn: str, x: Tensor) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.turn = turn
            return model(x)

        return run

    space = null_space(model, [closure(t, x) for t, x in zip((first, second), inputs, strict=True)])
    wanted: dict[str, list[Tensor]] = {}
    for turn, x in zip((first, second), inputs, strict=True):
        model.turn = turn
        for name, kept in own_space(model, [x], 1.0).items():
            wanted.setdefault(name, []).append(kept)
    for name, basis in space.bases.items():
        for kept in wanted[name]:
            assert basis.project(kept).norm() <= 1e-8
        both = torch.linalg.matrix_rank(sum(wanted[name]), atol=1e-8)
        assert basis.rank == int(both), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("samples", [3, 40])
def test_layers_with_the_same_inputs_share_one_basis(dtype: torch.dtype, samples: int) -> None:
    model = Attention().to(dtype)
    x = torch.randn(samples, 6, dtype=dtype)
    bases = null_space(model, [lambda: model(x)] * 2).bases
    assert bases["q"] is bases["k"] is bases["v"]
    assert bases["gate"] is bases["up"]
    assert len({id(basis) for basis in bases.values()}) == 3


@pytest.mark.parametrize(
    ("turn", "k_bias"), [("in place", True), ("clone", True), ("twice", True), ("", False)]
)
def test_layers_with_other_inputs_do_not(turn: str, k_bias: bool) -> None:
    model, x = Attention(turn, k_bias).double(), torch.randn(3, 6, dtype=torch.float64)
    bases = null_space(model, [lambda: model(x)]).bases
    assert bases["q"] is not bases["k"]


def test_another_threshold_is_another_basis() -> None:
    model, x = Attention().double(), torch.randn(5, 6, dtype=torch.float64)
    bases = null_space(model, [lambda: model(x)], {"q": 0.5}).bases
    assert bases["k"] is bases["v"]
    assert bases["q"].rank < bases["k"].rank


class Overwrites(nn.Module):
    """Writes to the input of a layer after it, as ``x += layer(x)`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.layer(x)
        return x


def test_inputs_that_the_model_overwrites_are_kept_as_they_were() -> None:
    model, x = Overwrites().double(), torch.randn(2, 6, dtype=torch.float64)
    basis = null_space(model, [lambda: model(x)]).bases["layer"]
    assert basis.project(x).norm() <= 1e-12


@few
@given(seeds, taus, taus)
def test_grow_is_the_space_made_at_that_tau(seed: int, one: float, other: float) -> None:
    """Downwards always, and back up from the larger one."""
    learner = Learner.drawn(seed, samples=12)
    large, small = max(one, other), min(one, other)
    space = learner.space(large)
    for grown, made in ((space.grow(small), learner.space(small)), (space.grow(large), space)):
        for name, basis in grown.bases.items():
            wanted = made.bases[name]
            assert torch.equal(basis.ranks, wanted.ranks)
            assert torch.equal(basis.vectors, wanted.vectors)
            assert torch.equal(basis.singular_values, wanted.singular_values)


def test_grow_beyond_what_is_held_is_refused() -> None:
    learner = Learner.drawn(0, samples=12)
    small = learner.space().grow(0.5)
    with pytest.raises(NullSpaceError, match=r"layer '0': tau = 1 takes 8 directions, of which"):
        small.grow(1.0)
    with pytest.raises(ValueError, match="tau must be in"):
        small.grow(0.0)
    with pytest.raises(ValueError, match="no layer matches 'x'"):
        small.grow({"x": 0.4})


def test_grow_by_patterns_leaves_other_layers() -> None:
    space = Learner.drawn(0, samples=12).space()
    grown = space.grow({"3": 0.5})
    assert grown.bases["3"].rank < space.bases["3"].rank
    assert grown.bases["0"] is space.bases["0"]


@pytest.mark.parametrize("kind", ["embedding", "tied"])
def test_tokens_grow_too(kind: str) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4).double()
    model = nn.Sequential(table)
    if kind == "tied":
        model.append(nn.Linear(4, 9, bias=False).double())
        model[1].weight = table.weight
    tokens = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    space = null_space(model, [lambda: model(tokens)])
    grown, made = space.grow(0.6), null_space(model, [lambda: model(tokens)], 0.6)
    for name, basis in made.bases.items():
        raw = torch.randn(*([9, 4] if kind == "tied" else [4, 9]), dtype=torch.float64)
        assert torch.equal(grown.bases[name].project(raw), basis.project(raw))
    again = grown.grow(1.0).bases["0"] if kind == "embedding" else None
    assert again is None or again.rank == 3, "counts of all tokens are held"


def test_only_included_layers_move() -> None:
    learner = Learner.drawn(0)
    space = null_space(
        learner.model, [lambda: learner.model(learner.old)], include=["[03]"], exclude=["3"]
    )
    assert list(space.bases) == ["0"]
    assert space.frozen["3"] == space.frozen["5"] == "left out by include or exclude"
    start = learner.state()
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-2)
    with space.attach(optimizer):
        learner.loss().backward()
        optimizer.step()
    changed = {n for n, v in learner.state().items() if not torch.equal(v, start[n])}
    assert changed == {"0.weight", "0.bias"}


def test_thresholds_by_pattern_are_those_of_each_alone() -> None:
    learner = Learner.drawn(0, samples=12)
    closures = [lambda: learner.model(learner.old)]
    space = null_space(learner.model, closures, {"3": 0.7, "[35]": 0.9})
    for name, tau in (("0", 1.0), ("3", 0.7), ("5", 0.9)):
        assert torch.equal(space.bases[name].vectors, learner.space(tau).bases[name].vectors)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"include": ["*mlp*"]}, r"no layer matches '\*mlp\*'; the model's layers are"),
        ({"exclude": ["9"]}, "no layer matches '9'"),
        ({"exclude": ["*"]}, "leave no layer that may move"),
        ({"tau": {"9": 0.5}}, "no layer matches '9'"),
        ({"tau": {"3": 1.5}}, "tau must be in"),
        ({"include": "3"}, r"include takes a list of patterns: \['3'\]"),
    ],
)
def test_wrong_choices_are_refused(options: dict[str, object], match: str) -> None:
    learner = Learner.drawn(0)
    with pytest.raises(ValueError, match=match):
        null_space(learner.model, [lambda: learner.model(learner.old)], **options)


@pytest.mark.parametrize("tau", [1.0, 0.8])
def test_shared_bases_are_in_the_file_once_and_loaded_shared(tmp_path: Path, tau: float) -> None:
    model, x = Attention().double(), torch.randn(5, 6, dtype=torch.float64)
    space = null_space(model, [lambda: model(x)], tau)
    space.save(tmp_path / "space")
    assert {name.split("/")[0] for name in load_file(tmp_path / "space")} == {"q", "gate", "down"}
    loaded = NullSpace.load(tmp_path / "space")
    assert list(loaded.bases) == list(space.bases)
    assert loaded.bases["q"] is loaded.bases["v"]
    for name, basis in loaded.bases.items():
        assert torch.equal(basis.vectors, space.bases[name].vectors)
    merged = loaded.merge(space).grow(tau).to("cpu")
    assert merged.bases["q"] is merged.bases["k"]
    assert merged.bases["gate"] is merged.bases["up"]


def test_a_file_of_the_first_format_is_read(tmp_path: Path) -> None:
    """As it was written before layers shared bases: three tensors a layer, no number."""
    basis = Learner.drawn(0).space().bases["0"]
    fields = ("vectors", "singular_values", "ranks")
    tensors = {f"{n}/own/{f}": getattr(basis, f).clone() for n in "qk" for f in fields}
    layers = {n: {"own": ["rows", "torch.float64"]} for n in "qk"}
    about = {"layers": json.dumps(layers), "frozen": json.dumps({"x": "no rule"})}
    save_file(tensors, tmp_path / "old", metadata=about)
    loaded = NullSpace.load(tmp_path / "old")
    assert loaded.frozen == {"x": "no rule"}
    assert all(torch.equal(loaded.bases[n].vectors, basis.vectors) for n in "qk")


def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "new", metadata={"format": "99", "layers": "{}"})
    with pytest.raises(NullSpaceError, match=r"of format 99.*reads up to format 2"):
        NullSpace.load(tmp_path / "new")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    Learner.drawn(0).space().save(tmp_path / "space")
    content = (tmp_path / "space").read_bytes()
    (tmp_path / "space").write_bytes(content[: int(share * len(content))])
    with pytest.raises(NullSpaceError, match="holds no saved null space"):
        NullSpace.load(tmp_path / "space")


@pytest.mark.parametrize("place", [-1, -400, 0.5, 0.99])
def test_a_file_with_another_bit_is_refused(tmp_path: Path, place: float) -> None:
    Learner.drawn(0).space().save(tmp_path / "space")
    content = bytearray((tmp_path / "space").read_bytes())
    content[place if isinstance(place, int) else int(place * len(content))] ^= 1
    (tmp_path / "space").write_bytes(content)
    with pytest.raises(NullSpaceError, match=r"damaged|holds no saved null space"):
        NullSpace.load(tmp_path / "space")


def test_a_failed_save_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Learner.drawn(0).space()
    space.save(tmp_path / "space")
    before = (tmp_path / "space").read_bytes()

    def fail(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_text("half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(file, "save_file", fail)
    with pytest.raises(NullSpaceError, match=r"cannot be written to .*no space left"):
        space.save(tmp_path / "space")
    assert (tmp_path / "space").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


@pytest.mark.parametrize("name", ["a\0b", "longer" * 50, "missing/space"])
def test_a_name_that_no_file_can_have_is_refused_in_our_words(tmp_path: Path, name: str) -> None:
    with pytest.raises(NullSpaceError, match="cannot be written to"):
        Learner.drawn(0).space().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions of a kind")
def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path: Path) -> None:
    """As one that Python makes; one that was there keeps what it had."""
    (tmp_path / "plain").touch()
    space = Learner.drawn(0).space()
    space.save(tmp_path / "space")
    assert (tmp_path / "space").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "space").chmod(0o640)
    space.save(tmp_path / "space")
    assert stat.S_IMODE((tmp_path / "space").stat().st_mode) == 0o640


def test_the_file_says_its_format(tmp_path: Path) -> None:
    Learner.drawn(0).space().save(tmp_path / "space")
    with safe_open(tmp_path / "space", framework="pt") as opened:
        assert opened.metadata()["format"] == "2"
