"""Side-by-side and scaling runs of NeuralMemory: `python -m benchmarks.memory`, then `python -m benchmarks.report`."""
