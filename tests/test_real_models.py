"""Real architectures, small and untrained, from the transformers package: no weights, no network.

``python tests/test_real_models.py`` prints the table of what moves in each of them.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teleport import Teleporter, TeleportReport
from tests.fingerprint import fingerprint

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


def build(name: str) -> tuple[nn.Module, Callable[[int], Callable[[], Tensor]]]:
    """A model in float64 and its loss on the batch of a seed."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).double()

    def batch(seed: int) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if name in ("ViT", "ResNet"):
            images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
            return lambda: model(pixel_values=images, labels=torch.tensor([0, 3])).loss
        tokens = torch.randint(5, 90, (2, 6), generator=generator)
        return lambda: model(input_ids=tokens, labels=tokens).loss

    return model, batch


def teleported(name: str, training: bool, method: str, tau: float = 1.0) -> TeleportReport:
    model, batch = build(name)
    model.train(training)
    limit = None if tau == 1.0 else 0.1
    teleporter = Teleporter(model, growth=1.2, tau=tau, method=method, max_drift=limit)
    return teleporter.step(batch(1), held_out=batch(2))


@pytest.mark.verifies("thm-invariance", "thm-survivor")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_kept_the_norm_grows_and_both_methods_agree(name: str, training: bool) -> None:
    fast = teleported(name, training, "tangent")
    slow = teleported(name, training, "double_backward")
    for report in (fast, slow):
        assert not report.rolled_back, report.reason
        assert report.drift <= report.tolerance
        assert report.growth == pytest.approx(1.2, rel=1e-6)
    assert fast.step_sizes == pytest.approx(slow.step_sizes, rel=1e-6)
    moved = {layer.name for layer in fast.layers if layer.status == "moved"}
    assert moved == {layer.name for layer in slow.layers if layer.status == "moved"}
    assert len(moved) >= 4


@pytest.mark.parametrize("name", MODELS)
def test_below_one_more_is_free_and_the_drift_is_honest(name: str) -> None:
    exact, loose = (teleported(name, False, "tangent", tau) for tau in (1.0, 0.99))
    assert not loose.rolled_back, loose.reason
    assert exact.drift <= loose.drift <= loose.tolerance
    for at_one, below in zip(exact.layers, loose.layers, strict=True):
        if at_one.null_dim is not None:
            assert below.null_dim >= at_one.null_dim


@pytest.mark.parametrize("name", MODELS)
def test_a_refused_teleport_leaves_everything_as_it_was(name: str) -> None:
    model, batch = build(name)
    before = fingerprint(model)
    report = Teleporter(model, tau=0.9, growth=3.0, max_drift=0.0).step(batch(1))
    assert report.rolled_back
    assert fingerprint(model) == before


def table() -> str:
    """What moves in each model, in evaluation mode."""
    head = "| model | tau | moved | frozen | free of inputs | growth | drift | held out |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for name in MODELS:
        for tau in (1.0, 0.99):
            report = teleported(name, False, "tangent", tau)
            layers = [layer for layer in report.layers if layer.rank is not None]
            free = sum(layer.null_dim or 0 for layer in layers)
            inputs = free + sum(layer.rank or 0 for layer in layers)
            moved = sum(layer.status == "moved" for layer in report.layers)
            frozen = sum(layer.status.startswith("frozen") for layer in report.layers)
            lines.append(
                f"| {name} | {tau:g} | {moved} | {frozen} | {free} of {inputs} "
                f"| {report.growth:.4f} | {report.drift:.1e} | {report.held_out_drift:.1e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
