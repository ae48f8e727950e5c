"""The checks of each chapter's exercises."""
