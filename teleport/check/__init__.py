"""Checks of functions that learners write: the smallest input on which one is wrong, and why.

Every name is a check: call it with your function, as in ``check.projection(my_projection)``. It
tries the function on small cases, prints a `Verdict` and returns it. ``check.CHECKS`` lists them;
``check.projection.signature`` says what the function has to take and to return. Hypothesis finds
the cases: ``pip install 'nullspace-teleport[course]'``.
"""

from teleport.check.chapters.ch01_level_sets import (
    largest_gradient,
    level_set_step,
    rotation,
    stationary,
)
from teleport.check.chapters.ch02_null_spaces import basis, energy_rank, merged_basis, rank
from teleport.check.chapters.ch03_mlp import (
    cap,
    projection,
    rows,
    survivor,
    teleport_gradient,
    teleport_step,
    tied_projection,
    weight_gradient,
)
from teleport.check.chapters.ch04_convolution import conv_rows, grouped_projection, layer_projection
from teleport.check.chapters.ch05_attention import (
    attention_rows,
    causal_tokens,
    layernorm_direction,
    qk_move,
)
from teleport.check.chapters.ch06_step import (
    adam_direction,
    growth_step,
    path_degree,
    polynomial_degree,
)
from teleport.check.chapters.ch07_error_control import drift_bound, held_out_drift, total_move
from teleport.check.chapters.ch08_rivals import balanced, change_of_basis, group_action
from teleport.check.chapters.ch09_evidence import half_width, holm, log_loss, tally
from teleport.check.chapters.ch12_keeping import free_directions, kept_weights, leak, recall_at
from teleport.check.engine import Check
from teleport.check.recall import answer, choice, seal_of, value
from teleport.check.verdict import Verdict

CHECKS = {one.name: one for one in tuple(globals().values()) if isinstance(one, Check)}
"""Every check of a function, by name."""

__all__ = [
    "CHECKS",
    "Check",
    "Verdict",
    "adam_direction",
    "answer",
    "attention_rows",
    "balanced",
    "basis",
    "cap",
    "causal_tokens",
    "change_of_basis",
    "choice",
    "conv_rows",
    "drift_bound",
    "energy_rank",
    "free_directions",
    "group_action",
    "grouped_projection",
    "growth_step",
    "half_width",
    "held_out_drift",
    "holm",
    "kept_weights",
    "largest_gradient",
    "layer_projection",
    "layernorm_direction",
    "leak",
    "level_set_step",
    "log_loss",
    "merged_basis",
    "path_degree",
    "polynomial_degree",
    "projection",
    "qk_move",
    "rank",
    "recall_at",
    "rotation",
    "rows",
    "seal_of",
    "stationary",
    "survivor",
    "tally",
    "teleport_gradient",
    "teleport_step",
    "tied_projection",
    "total_move",
    "value",
    "weight_gradient",
]
