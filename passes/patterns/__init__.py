"""Arithmetic that spells a norm, an activation or a size."""
