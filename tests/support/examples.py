"""How many examples a test draws, in each tier."""

from typing import Any

from hypothesis import settings

PLAIN = 30
"""Examples of a test that says nothing else, unless more are asked for (``--deep``)."""


def examples(count: int, **others: Any) -> settings:
    """So many, and as many times more as other tests draw; other settings as in Hypothesis."""
    return settings(max_examples=count * settings.default.max_examples // PLAIN, **others)
