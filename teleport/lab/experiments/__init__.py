"""Named trainings: their table, arms, networks, one run, many runs."""
