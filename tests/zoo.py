"""A zoo of tiny trained-looking models, one per situation that a pass must get right.

`ZOO[name].build()` gives the same module every time: seeded weights, random norm statistics and affines, eval mode.
The convolutional part is in `zoo_convs.py`, the residual streams are in `zoo_streams.py`, the layers of `normfuse.nn` in
`zoo_family.py`.
"""

from tests.zoo_convs import CONVOLUTIONAL
from tests.zoo_entry import Entry, randomise_norms, seeded
from tests.zoo_family import FAMILY
from tests.zoo_streams import STREAMS

__all__ = ["ZOO", "Entry", "randomise_norms", "seeded"]

ZOO: dict[str, Entry] = CONVOLUTIONAL | STREAMS | FAMILY
