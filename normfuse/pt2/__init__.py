"""Saved `ExportedProgram`s (`.pt2`): written with their report, read without running what a file says.

PyTorch's own reader unpickles, imports, evaluates text and writes it into generated Python. It never sees a foreign file here:
`archive` reads the members, `schema` rebuilds what they say from a list of allowed parts, and PyTorch loads the copy that `load`
makes of that alone.
"""

from normfuse.pt2.load import load_program, read_report
from normfuse.pt2.save import save_program

__all__ = ["load_program", "read_report", "save_program"]
