"""What normfuse's kernels do on one NVIDIA GPU: `python -m benchmarks.gpu`.

run.py        the command line
asked.py      what it asked for
checks.py     every kernel against float64
probe.py      does TensorRT for RTX take this GPU?
clock.py      cold caches, CUDA graphs, interleaved, the clock of the device
norms.py      memory-bound kernels against PyTorch and torch.compile, and against the bandwidth
products.py   integer products against fp16 and int8 products of PyTorch
models.py     latency of whole models
tables.py     what is written to benchmarks/results
"""
