"""Triton code, a file for each kind of work. Importing one of these modules imports triton; see `normfuse.gpu.launch`."""
