"""Kernels for NVIDIA GPUs, written once in Triton: launched by PyTorch, compiled ahead of time for TensorRT.

`plan_*` say what a layer launches (a `Launch`), `run` launches it on tensors, `compiled` makes PTX of it on any machine.
Only `normfuse.gpu.kernels` imports triton, and only when one of these two needs it.
"""
