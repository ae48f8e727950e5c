"""What many runs say together: outcomes, counts, curves."""
