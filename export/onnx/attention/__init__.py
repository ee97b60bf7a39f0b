"""Attention in the forms that runtimes have kernels for."""
