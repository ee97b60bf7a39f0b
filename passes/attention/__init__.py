"""Attention on the graph: recognised where it is spelled out, without masks that hide nothing, and where its operands lie."""
