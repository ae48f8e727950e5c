"""Everything about experiments: their table, records, what many runs say, what a teleport costs."""
