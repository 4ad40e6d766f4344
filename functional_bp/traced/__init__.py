"""A layer from any JAX function: its jaxpr says how each parameter meets an example."""
