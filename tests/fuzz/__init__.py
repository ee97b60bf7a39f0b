"""Random models, and what `normfuse` makes of them: `python -m tests.fuzz --cases 1000`; see docs/testing.md.

    spec       a model as data: steps that read values, each a block and a seed
    emit       a spec as the Python source of a module
    blocks_*   the building blocks: one small function each
    generate   a seed as a spec
    oracle     what must hold of the optimized model
    shrink     the smallest spec that fails in the same way
    run        many cases in worker processes

The generator is our own and not Hypothesis: a case is a *program* whose later steps depend on the shapes of earlier ones. It must
shrink to a module that a person reads (leave a step out, let its readers read what it read), and ten thousand cases must run in
processes that may die, go on after an interruption, and be repeated from a number.
"""
