"""The training proof: small models trained with the layers of `normfuse.nn`, then optimized, exported and compared.

`python -m benchmarks.training` runs all of it and goes on where it stopped.
"""
