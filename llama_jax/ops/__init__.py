"""Floor 2: the mathematics, as pure functions of arrays."""
