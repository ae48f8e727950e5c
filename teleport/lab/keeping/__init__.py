"""Sequences of tasks: methods that keep the old ones, training, measures, report."""
