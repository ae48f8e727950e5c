"""What a teleport costs."""
