"""The parts that every room shares: one attention, one MLP, one transformer block, one set of conv blocks."""
