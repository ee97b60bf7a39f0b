"""What `fold` says of a module in the place where its report speaks of it."""

import normfuse
from tests.zoo import ZOO


def test_gains_of_one_module_are_told_together():
    entry = ZOO["preln_vit"]
    report = normfuse.report(normfuse.fold(entry.build(), entry.args))
    told = [s.note.partition(";")[0] for s in report.applied if s.rule == "affine_into_producer"]
    assert told == ["gamma1 and gamma2 are one"] * 4  # two a block
