"""The first minutes on a GPU: `python -m benchmarks.gpu.first_light`.

command.py    the command line
steps.py      what is done, in which order, each in how much time
children.py   one step in a process of its own, which may crash or hang
record.py     JSON lines: what came back, step by step
page.py       the section of docs/results.md
"""
