"""What a GPU can say about this library, in one command that fits into one short lease of it."""
