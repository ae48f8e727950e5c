"""Records of runs that nobody trained, for pages and tables."""

import json
from pathlib import Path
from typing import Any

LAYER = {
    "name": "body.2", "kind": "Linear", "d_in": 17, "d_out": 16, "rank": 7, "null_dim": 10,
    "move_norm": 0.457, "output_bound": 0.0, "status": "moved", "groups": 1,
    "grad_norm_before": 1.0, "grad_norm_after": 2.5,
}  # fmt: skip


def evaluation(step: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    """One row, at a loss that is also that of the test images."""
    times = {"epoch": 0.0, "train_seconds": step / 10, "teleport_seconds": 0.0}
    values = {"train_loss": loss, "test_loss": loss, "test_accuracy": 0.5, "grad_norm": 1.0}
    return {"type": "evaluation", "step": step, **times, **values, **changes}


def write_record(
    folder: Path,
    arm: str,
    losses: dict[int, float | None],
    *,
    seed: int = 0,
    baseline: str | None = None,
    layers: list[dict[str, Any]] | None = None,
    end: dict[str, Any] | None = None,
    order: int = 0,
) -> Path:
    """A record with a teleport after the first step, if the arm has a baseline.

    Args:
        folder: of it, made if it is not there.
        arm: its name.
        losses: by step.
        seed: of the run.
        baseline: the arm without the teleport.
        layers: of the teleport.
        end: its last row; None for a run that goes on.
        order: of the arm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    when = {"epochs": 1, "batches": 1, "warmup_steps": 1}
    teleport = {"schedule": when, "batch_size": 9, "tau": 1.0, "steps": None}
    teleport |= dict.fromkeys(("lr", "growth", "cap"))
    training = {"lr": 0.1, "teleport": baseline is not None, "rival": ""}
    settings = {"optimizer": "sgd", "preset": "tiny", "teleport": teleport}
    config = {
        "type": "config", "experiment": "e", "arm": arm, "baseline": baseline or arm,
        "order": order, "seed": seed, "training": training, "settings": settings,
        "command": "teleport run",
    }  # fmt: skip
    rows: list[dict[str, Any]] = [config]
    for number, (step, loss) in enumerate(losses.items()):
        rows.append(evaluation(step, loss, train_seconds=step / 10 + order + seed / 7))
        if number == 0 and baseline is not None:
            both = {"loss": (1.0, 1.0), "grad_norm": (0.5, 0.75), "held_out": (1.0, 1.1)}
            row = {
                f"{k}_{w}": v
                for k, two in both.items()
                for w, v in zip(("before", "after"), two, strict=True)
            }
            rows.append({"type": "teleport", "step": 1, "reason": "asked", **row, "layers": layers})
    rows += [{"type": "end", **end}] if end else []
    path = folder / f"{order:02}-{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
