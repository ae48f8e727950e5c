"""The paper's figures: input energy, threshold, products."""
