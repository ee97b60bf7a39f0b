"""The model as it was given: its inputs, its flags, what it computes."""
