"""Proven bounds on how far a network's outputs move (``thm-drift``)."""
