"""Many adapters in one batch, inside the transform: rows, rules and the grouped product."""
