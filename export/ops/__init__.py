"""The ops of the domain `normfuse`, each defined in standard ops: bodies of functions, and what portable files hold instead.

A file of this folder that states an `Op` is all that it takes to have one (docs/writing-an-operator.md).
"""

from __future__ import annotations

from normfuse.export.ops.emitter import DOMAIN, FunctionBody, Op
from normfuse.stated import stated

__all__ = ["DOMAIN", "OPS", "OP_OF", "FunctionBody", "Op"]


#: By op type.
OPS = {op.name: op for op in stated(__name__, __path__, Op)}
#: By operator of `torch.ops.normfuse`.
OP_OF = {operator: op for op in OPS.values() for operator in op.stands_for}
