"""Real architectures, small and untrained: from the transformers package, and our own.

``python tests/core/test_real_models.py`` prints the table of what moves in each of them;
``python tests/core/test_real_models.py searches`` in how many the step is searched on the model
itself.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport import Teleporter, TeleportReport
from teleport.runtime.transaction import Transaction
from tests.support import own_models
from tests.support.fingerprint import fingerprint

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="pip install '.[test]' brings it")

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 100, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2},
    ),
    "BERT": (
        "BertForMaskedLM",
        "BertConfig",
        {**TEXT, "vocab_size": 100, "intermediate_size": 64},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2}
        | {"num_heads": 2, "decoder_start_token_id": 0},
    ),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 100, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {**TEXT, "image_size": 16, "patch_size": 4, "intermediate_size": 64, "num_labels": 5},
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1]}
        | {"layer_type": "basic", "num_labels": 5},
    ),
}


NAMES = [*MODELS, *own_models.TOKENS, *own_models.IMAGES]
WITH_BATCH_NORM = ("ResNet", "U-Net, BatchNorm", "depthwise separable")

Run = Callable[[int], tuple[Tensor, Tensor]]


def build(
    name: str, dtype: torch.dtype = torch.float64, examples: int = 2
) -> tuple[nn.Module, Run]:
    """A model; its logits and its loss on the batch of a seed."""
    torch.manual_seed(0)
    if name in MODELS:
        kind, config, settings = MODELS[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).to(dtype)
        if name in ("ViT", "ResNet"):
            return model, partial(run_vision, model, examples)
        return model, partial(run_language, model, examples)
    if name in own_models.TOKENS:
        model = own_models.TOKENS[name]().to(dtype)
        return model, partial(run_tokens, model, examples)
    model = own_models.IMAGES[name]().to(dtype)
    return model, partial(run_images, model, examples)


def images_of(model: nn.Module, examples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return torch.rand(examples, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)


def tokens_of(examples: int, seed: int) -> Tensor:
    return torch.randint(5, 90, (examples, 6), generator=torch.Generator().manual_seed(seed))


def classes_of(examples: int) -> Tensor:
    return 3 * torch.arange(examples) % own_models.CLASSES


def run_vision(model: Any, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    found = model(pixel_values=images_of(model, examples, seed), labels=classes_of(examples))
    return found.logits, found.loss


def run_language(model: Any, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    tokens = tokens_of(examples, seed)
    found = model(input_ids=tokens, labels=tokens)
    return found.logits, found.loss


def run_tokens(model: nn.Module, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Every token but the first is to be predicted from those before it."""
    tokens = tokens_of(examples, seed)
    logits = model(tokens)
    return logits, functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run_images(model: nn.Module, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """A class for each image, or for each of its pixels: of how bright it is."""
    images = images_of(model, examples, seed)
    logits = model(images)
    classes = (own_models.CLASSES * images.mean(1)).long()
    target = classes if logits.dim() == 4 else classes_of(examples)
    return logits, functional.cross_entropy(logits, target)


def teleported(name: str, training: bool, method: str, tau: float = 1.0) -> TeleportReport:
    """Teleport, and see at tau = 1 that the logits are the same as before."""
    model, run = build(name)
    model.train(training)
    limit = None if tau == 1.0 else 0.1
    teleporter = Teleporter(model, growth=1.2, tau=tau, method=method, max_drift=limit)
    before = logits(model, run)
    report = teleporter.step(lambda: run(1)[1], held_out=lambda: run(2)[1])
    if tau == 1.0:
        assert (logits(model, run) - before).norm() <= 1e-11 * (1 + before.norm())
    return report


def logits(model: nn.Module, run: Run) -> Tensor:
    """On the teleport batch, with what the model is when it teleports."""
    with Transaction(model) as transaction, torch.no_grad():
        return transaction.until_quiet(transaction.repeatable(lambda: run(1)[0]))[0]


@pytest.mark.verifies("thm-invariance", "thm-survivor")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_kept_the_norm_grows_and_both_methods_agree(
    name: str, training: bool
) -> None:
    fast = teleported(name, training, "tangent")
    slow = teleported(name, training, "double_backward")
    for report in (fast, slow):
        assert not report.rolled_back, report.reason
        assert report.drift <= report.tolerance
        assert report.growth == pytest.approx(1.2, rel=1e-6)
    assert fast.step_sizes == pytest.approx(slow.step_sizes, rel=1e-6)
    moved = {layer.name for layer in fast.layers if layer.status == "moved"}
    assert moved == {layer.name for layer in slow.layers if layer.status == "moved"}
    assert len(moved) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_below_one_more_is_free_and_the_drift_is_honest(name: str) -> None:
    exact, loose = (teleported(name, False, "tangent", tau) for tau in (1.0, 0.99))
    assert not loose.rolled_back, loose.reason
    assert exact.drift <= loose.drift <= loose.tolerance
    for at_one, below in zip(exact.layers, loose.layers, strict=True):
        if at_one.null_dim is not None:
            assert below.null_dim >= at_one.null_dim


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training"),
    [(name, False) for name in NAMES] + [(name, True) for name in WITH_BATCH_NORM],
)
def test_a_refused_teleport_leaves_everything_as_it_was(name: str, training: bool) -> None:
    model, run = build(name)
    model.train(training)
    before = fingerprint(model)
    report = Teleporter(model, tau=0.9, growth=3.0, max_drift=0.0).step(lambda: run(1)[1])
    assert report.rolled_back
    assert fingerprint(model) == before


def table() -> str:
    """What moves in each model, in evaluation mode; those with BatchNorm in training mode, too."""
    head = "| model | tau | moved | frozen | free of inputs | growth | drift | held out |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    runs = [(name, False) for name in NAMES] + [(name, True) for name in WITH_BATCH_NORM]
    for name, training in sorted(runs, key=lambda run: NAMES.index(run[0])):
        for tau in (1.0, 0.99):
            report = teleported(name, training, "tangent", tau)
            layers = [layer for layer in report.layers if layer.rank is not None]
            free = sum(layer.null_dim or 0 for layer in layers)
            inputs = free + sum(layer.rank or 0 for layer in layers)
            moved = sum(layer.status == "moved" for layer in report.layers)
            frozen = sum(layer.status.startswith("frozen") for layer in report.layers)
            lines.append(
                f"| {name}{', training' * training} | {tau:g} | {moved} | {frozen} "
                f"| {free} of {inputs} "
                f"| {report.growth:.4f} | {report.drift:.1e} | {report.held_out_drift:.1e} |"
            )
    return "\n".join(lines)


def searched(name: str, training: bool, dtype: torch.dtype, examples: int) -> TeleportReport:
    """A default teleport, whose reason says whether the step was searched on the model itself."""
    model, run = build(name, dtype, examples)
    return Teleporter(model.train(training)).step(lambda: run(1)[1])


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_reaches_the_growth_with_frozen_activations(name: str) -> None:
    """Where the step is searched on the model itself, a teleport takes several times as long.

    Sixteen examples fill all inputs of some of these small models; two leave each one room.
    """
    for examples in (2, 16):
        report = searched(name, True, torch.float32, examples)
        assert not report.rolled_back, report.reason
        assert "model itself" not in report.reason
        if examples == 2 or not report.reason.startswith("nothing can move"):
            assert report.growth == pytest.approx(1.5, rel=0.01)


def searches() -> str:
    """In which models, and how often, the step is searched on the model itself."""
    lines = ["| dtype | examples | teleports | searched on the model itself | undone | which |"]
    lines.append("|---|---|---|---|---|---|")
    for dtype, examples in ((torch.float64, 2), (torch.float32, 2), (torch.float32, 64)):
        runs = {
            name + ", training" * training: searched(name, training, dtype, examples)
            for name in NAMES
            for training in (False, True)
        }
        which = [name for name, report in runs.items() if "model itself" in report.reason]
        undone = sum(report.rolled_back for report in runs.values())
        lines.append(
            f"| {str(dtype).removeprefix('torch.')} | {examples} | {len(runs)} | {len(which)} "
            f"| {undone} | {', '.join(which) or '-'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(searches() if "searches" in sys.argv else table())  # noqa: T201
