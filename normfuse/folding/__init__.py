"""`fold`: the result of the passes, written back into a copy of the model."""
