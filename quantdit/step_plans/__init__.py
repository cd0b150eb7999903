"""Step plans: which steps of a trajectory a transformer computes, and how the outputs of the others are forecast."""
