"""Measurements by subject: `benchmarks.speed` for time and memory, `benchmarks.learning` for what models learn."""
