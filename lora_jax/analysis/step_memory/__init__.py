"""Memory of a training step, estimated from shapes."""
