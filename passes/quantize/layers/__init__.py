"""Layers with weights, as quantization finds them, whatever the number format: what each kind reads, multiplies and writes.

layer.py        what they have in common
linear.py       products with a matrix
conv2d.py       convolutions in one or two dimensions
embedding.py    tables
find.py         which nodes of a graph are layers, and why others are none
"""
