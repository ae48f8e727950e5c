"""Tables of experiments that tests build on."""

from pathlib import Path

SMALL = """
[small]
title = "a small network"
data.ours = "mnist-sample"
network.kind.ours = "mlp"
network.hidden.ours = [4]
batch_size.ours = 32
teleport.lr.ours = 0.2
teleport.cap.ours = 3.0
teleport.warmup_steps.ours = 2
teleport.n.ours = 25
teleport.held_out.ours = 20
presets.tiny.ours = { epochs = 1, train_size = 64, evaluate_every = 1, evaluate_size = 10 }
tuning.sgd.ours = { low = 0.2, tuned = 0.2, gain_lr = 0.2, init = "default", head_gain = 1.0 }
"""
"""A network small enough for the command line's tests."""


def small(folder: Path) -> str:
    """Write the table into a folder; the name of its network."""
    path = folder / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return f"{path}:small"
