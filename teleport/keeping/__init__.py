"""The null space as a tool: keep an old function while something new is learned (``thm-keep``)."""
