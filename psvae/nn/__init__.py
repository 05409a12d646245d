"""The parts that every room shares: one attention, positions, the blocks of a ViT, a language model and a conv net."""
