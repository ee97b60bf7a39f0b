"""Chains: stretches of convolutional networks whose activations stay u8 codes from layer to layer (`normfuse.ops.codes`).

`find` reads the steps of a chain in the float graph, `ranges` finds what a code is worth between them, `steps` says what each
becomes, and `chains` puts them into the graph.
"""
