"""How the weights of a memory evolve over a sequence; knows nothing of projections or attention."""
