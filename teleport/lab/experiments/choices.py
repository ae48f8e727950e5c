"""What a user can choose by name, without what the names stand for.

The command line explains itself, and a table of experiments is read, before PyTorch is loaded.
"""

INITS = ("default", "he")
"""Initial values; see `teleport.models.initialise`."""

READOUTS = ("mean", "last", "all")
"""What the head of a `teleport.models.Transformer` reads."""

ACTIVATION_NAMES = ("relu", "leaky_relu", "tanh")
"""Of the hidden layers of `teleport.models.mlp`."""

OPTIMIZER_NAMES = ("sgd", "momentum", "adagrad", "adam", "adamw")
"""Those with a name of our own; see `teleport.lab.experiments.optimizers`."""

METHOD_NAMES = (
    *("plain", "projected", "lazy", "replay", "random"),
    *("gpm", "gpm-lazy", "gpm-growing", "gpm-adam", "two-sided"),
)
"""Ways to learn a task after others; see `teleport.lab.keeping.methods`."""

SEQUENCE_NAMES = ("digits", "mnist-fashion", "permuted-mnist", "gpm-mnist")
"""Of tasks; see `teleport.lab.keeping.tasks`."""

KEEP_NAMES = ("words", "edit", "leak")
"""Of `teleport keep`; see `frontier`, `edits` and `leak` in `teleport.lab.keeping`."""

BENCHMARK_NAMES = (
    "step", "basis", "scaling", "memory", "layers", "rivals", "ranks", "deep", "keeping",
)  # fmt: skip
"""See `teleport.lab.bench.benchmarks`."""

NOT_IN_ALL = ("rivals", "ranks", "deep", "keeping")
"""Those that come only if asked for: a rival's teleport can take a hundred gradients, those of a
deep network take seconds each; ranks are processes, whose counts are the same on every machine; and
keeping needs an extra."""

CHECKPOINT_SECONDS = 60.0
"""Between checkpoints of a run."""
