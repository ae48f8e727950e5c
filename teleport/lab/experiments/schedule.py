"""The schedules of experiments, by name."""

from teleport.schedule import Schedule

SCHEDULES = {
    "default": Schedule(epochs=1, batches=1, warmup_steps=50),
    "paper": Schedule(epochs=5, batches=32, warmup_steps=0),
}
"""``default``: once, early (``paper`` is section 4.1 of the paper: first 5 epochs, 32 batches)."""
