"""Layers of the papers' official repositories, recognised in a model and replaced by ours before it is traced."""

from normfuse.importers.walk import eval_mode, recognise

__all__ = ["eval_mode", "recognise"]
