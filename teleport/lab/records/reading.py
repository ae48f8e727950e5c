"""Records of runs, read and compared: what is public as ``teleport.records``."""

from teleport.lab.records.compare import ArmSummary, Comparison, best_baseline, compare, summarise
from teleport.lab.records.runs import Run, by_arm, read_run, read_runs

__all__ = [
    "ArmSummary",
    "Comparison",
    "Run",
    "best_baseline",
    "by_arm",
    "compare",
    "read_run",
    "read_runs",
    "summarise",
]
