"""The ops of the domain `normfuse`, each defined in standard ops: bodies of functions, and what portable files hold instead.

A file of this folder that states an `Op` is all that it takes to have one (docs/writing-an-operator.md).
"""

from __future__ import annotations

import importlib
import pkgutil

from normfuse.export.ops.emitter import DOMAIN, FunctionBody, Op

__all__ = ["DOMAIN", "OPS", "OP_OF", "FunctionBody", "Op"]


def _stated() -> dict[str, Op]:
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Op):
                found[value.name] = value
    return dict(sorted(found.items()))


#: By op type.
OPS = _stated()
#: By operator of `torch.ops.normfuse`.
OP_OF = {operator: op for op in OPS.values() for operator in op.stands_for}
