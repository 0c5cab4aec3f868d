"""Which leaves are adapted, and the role of each of their dimensions."""
