"""Rivals on the same work: the same model, the same batch, the same clock."""
