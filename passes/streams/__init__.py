"""Residual streams: what is written to them, who sees their mean, and norms on them."""
