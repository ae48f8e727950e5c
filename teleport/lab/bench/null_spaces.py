"""What the null space as a tool costs beside the work that it is for.

A sentence model of MiniLM's shape is built on the spot. Its weights are random, so that its inputs
fill more directions than those of a trained one: the ratios are about what a user can expect, on
the careful side.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from teleport.errors import RunError
from teleport.keeping.null_space import NullSpace, null_space
from teleport.lab.bench.timing import Measurement, TimedTask, interleaved

AT_ONCE = 10
"""Steps that are timed together: a projection comes once in so many."""


def comparisons(
    small: bool, device: torch.device, **spent: Any
) -> list[tuple[str, Callable[[], list[Measurement]]]]:
    """By name; ``spent`` is for `interleaved`. RunError if Hugging Face's libraries are missing."""
    missing = [name for name in ("transformers", "peft") if not find_spec(name)]
    if missing:
        raise RunError(
            f"the benchmark needs {', '.join(missing)}: pip install 'nullspace-teleport[keeping]'"
        )
    return [
        ("null space", partial(_spaces, small, device, spent)),
        ("steps", partial(_steps, small, device, spent)),
    ]


class _Sentences:
    """A model with random weights, and sentences of random tokens in batches."""

    def __init__(self, small: bool, device: torch.device) -> None:
        from transformers import BertConfig, BertModel

        width, layers, heads, count, length = (16, 1, 2, 8, 4) if small else (384, 6, 12, 256, 16)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=30522, hidden_size=width, num_hidden_layers=layers,
                num_attention_heads=heads, intermediate_size=4 * width,
            )  # fmt: skip
            self.model: nn.Module = BertModel(config, add_pooling_layer=False).eval().to(device)
            self.tokens = torch.randint(30522, (count, length)).to(device).split(-(-count // 4))
        self.shape = f"{layers} x {width}, {count} sentences of {length}"

    def closures(self) -> list[Callable[[], Any]]:
        return [partial(self.model, tokens) for tokens in self.tokens]

    @torch.no_grad()
    def forward(self) -> None:
        for closure in self.closures():
            closure()

    def space(self, tau: float) -> NullSpace:
        return null_space(self.model, self.closures(), tau, progress=False)

    def adapted(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        names = ["query", "key", "value", "dense"]
        found: nn.Module = get_peft_model(self.model, LoraConfig(r=16, target_modules=names))
        return found


def _spaces(small: bool, device: torch.device, spent: dict[str, Any]) -> list[Measurement]:
    """The null space of sentences against the forward pass of the same sentences."""
    case = _Sentences(small, device)
    tasks = {
        "tau 0.99": TimedTask(lambda _: case.space(0.99)),
        "tau 1": TimedTask(lambda _: case.space(1.0)),
    }
    return _rows(case, "forward pass", TimedTask(lambda _: case.forward()), tasks, spent)


def _steps(small: bool, device: torch.device, spent: dict[str, Any]) -> list[Measurement]:
    """Steps of AdamW on one batch, alone and with what keeps the old function."""
    cases = {name: _Sentences(small, device) for name in ("plain", "attach(every=10)", "lora_")}
    models = {name: case.model for name, case in cases.items()}
    space = cases["plain"].space(0.99)
    models["lora_"] = cases["lora_"].adapted()
    space.lora_(models["lora_"])
    tasks = {}
    for name, model in models.items():
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        if name == "attach(every=10)":
            space.attach(optimizer, every=AT_ONCE, model=model)
        tasks[name] = TimedTask(partial(_train, model, optimizer, cases[name].tokens[0]))
    plain = tasks.pop("plain")
    return _rows(cases["plain"], "plain step", plain, tasks, spent)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, prepared: None
) -> None:
    for _ in range(AT_ONCE):
        optimizer.zero_grad()
        model(tokens).last_hidden_state.square().mean().backward()
        optimizer.step()


def _rows(
    case: _Sentences,
    against: str,
    reference: TimedTask,
    tasks: dict[str, TimedTask],
    spent: dict[str, Any],
) -> list[Measurement]:
    timings = interleaved(reference, tasks, **spent)
    what = {"network": against, "shape": case.shape}
    return [{**what, "operation": name, **timing.row} for name, timing in timings.items()]
