"""A step does not wander: how many files one enters, and how often it goes from one to another."""

from tests.support.trace import trip


def test_one_step_stays_in_few_files() -> None:
    """Not more than when this was written: a module split without need shows here."""
    found = trip()
    assert len(found.files) <= 27  # six of them the folders `recording` and `subspace`
    # Two of them ask whether FSDP2 has spread the model, 80 make the graph again for the looks.
    assert sum(found.changes.values()) <= 640
