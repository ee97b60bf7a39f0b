"""An exported program in the operators that its target has kernels for: passes on the ATen graph, before anything is written."""
