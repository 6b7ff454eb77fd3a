"""What the models cost in time and memory, beside others of their size: `python -m benchmarks`, see README.md."""
