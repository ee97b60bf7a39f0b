"""What `docs/results.md` is made of: `python -m benchmarks` measures all of it."""
