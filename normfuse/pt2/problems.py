"""Why a file is not loaded."""

__all__ = ["Broken", "Unsafe"]


class Broken(Exception):
    """The file is no saved ExportedProgram: what is wrong, and where."""


class Unsafe(Exception):
    """The file asks for something that may have effects, or that is not known to have none: what, and where."""
