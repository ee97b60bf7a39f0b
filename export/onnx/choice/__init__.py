"""Which form attention and quantized layers take in a file: by a table, or measured."""
