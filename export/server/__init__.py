"""Model repositories of NVIDIA Triton Inference Server.

repository.py  write_repository: a folder that the server loads
signature.py   what an ONNX file or an engine takes and gives
batching.py    whether requests may be put together, and how many
config.py      config.pbtxt
text.py        the text format of protocol buffers
warmup.py      requests that the server runs before it says that it is ready
folders.py     folders that appear whole
"""

from normfuse.export.server.repository import Served, check_place, write_repository

__all__ = ["Served", "check_place", "write_repository"]
