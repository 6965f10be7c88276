"""What several test files share: the oracle, the reference, golden vectors, configurations and streams."""
