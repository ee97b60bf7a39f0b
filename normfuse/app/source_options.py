"""How the model that a command names is loaded, and what it is called with."""

from dataclasses import dataclass
from pathlib import Path

from normfuse.errors import UsageError

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How a source is loaded and what it is called with.

    Attributes:
        pretrained: fetch the published weights; otherwise weights are random, with random norm statistics.
        trust: files may run code (pickles, custom code of Hugging Face folders).
        shapes: shapes of the inputs as text, see `normfuse.app.example_inputs.parse_shape`; instead of declared inputs.
        input: a file that holds the inputs, instead of declared ones.
        batch: leading size of declared inputs.
        tokens: sequence length of declared inputs.
        seed: of random weights and random inputs.
        weights: a state dict that is loaded into the model once it is built.
    """

    pretrained: bool = False
    trust: bool = False
    shapes: tuple[str, ...] = ()
    input: Path | None = None
    batch: int | None = None
    tokens: int | None = None
    seed: int = 0
    weights: Path | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.pretrained:
            raise UsageError("--pretrained and --weights both say which weights: pass one of them")
        given = [n for n, v in (("--shape", self.shapes), ("--input", self.input)) if v]
        if len(given) > 1:
            raise UsageError("--shape and --input both say what the model is called with: pass one of them")
        sized = [n for n, v in (("--batch", self.batch), ("--seq", self.tokens)) if v is not None]
        if given and sized:
            raise UsageError(f"{sized[0]} sizes the inputs that a model declares itself; {given[0]} states them: pass one of them")
