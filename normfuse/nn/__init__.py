"""Trainable normalization layers of the field's papers, and what is done with them before inference.

Each layer states its identity, its shapes and its source; `normfuse.optimize` takes each to the inference form that its
paper promises.
"""
