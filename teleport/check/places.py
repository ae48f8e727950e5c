"""Where the book states what a verdict refers to."""

CHAPTERS = {
    "01_level_sets": ("eq-level-functions", "thm-newton"),
    "02_null_spaces": ("thm-rank",),
    "03_mlp": ("thm-span", "thm-invariance", "thm-layerwise", "thm-survivor", "thm-fixed"),
    "05_attention": ("thm-layernorm", "eq-att-head"),
    "06_objective_and_step": ("thm-polynomial", "thm-geometry"),
    "07_error_control": ("thm-drift", "thm-batch"),
    "08_rivals": (
        "thm-group-action",
        "thm-lie-gradient",
        "thm-first-order-inverse",
        "thm-linearised",
        "thm-change-of-basis",
    ),
    "09_experiments_mlp_cnn": ("eq-exp-resolved", "eq-exp-step"),
    "11_what_is_true": ("eq-true-holm",),
    "12_keeping_a_function": ("thm-keep", "eq-keep-displacement"),
    "13_fine_tuning_real_models": ("eq-real-recall",),
}
"""Labels that each chapter's notebook, named without suffix, holds."""

CHAPTER_OF = {label: chapter for chapter, labels in CHAPTERS.items() for label in labels}
