"""A model as it is: calling it, the layers that it offers, hooks, pooling."""
