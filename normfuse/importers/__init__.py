"""Layers of the papers' official repositories, recognised in a model and replaced by ours before it is traced."""

from normfuse.importers.walk import recognise

__all__ = ["recognise"]
