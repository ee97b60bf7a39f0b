"""Attention in the nodes of a file: one translation for each of its forms."""
