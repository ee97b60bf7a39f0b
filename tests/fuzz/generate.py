"""A spec from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.fuzz import blocks_any, blocks_images, blocks_norms, blocks_tokens  # noqa: F401  (they register themselves)
from tests.fuzz.emit import BLOCKS, STRUCTURES, Emitter, Invalid, Value, accepts
from tests.fuzz.spec import DTYPES, Input, Mode, Spec, Step

__all__ = ["Options", "generate"]


@dataclass(frozen=True)
class Options:
    """What the cases of a run have in common.

    Attributes:
        dtype: of every case; empty draws it.
        without_inputs: the share of cases that are traced without example inputs.
        export_share, quantize_share, passes_share, dynamic_share: of cases with files, integers, opt-in passes, free sizes.
        verify: of every case; empty draws it.
        target: of every file; empty draws it.
    """

    dtype: str = ""
    without_inputs: float = 0.25
    export_share: float = 0.03
    quantize_share: float = 0.05
    passes_share: float = 0.1
    dynamic_share: float = 0.25
    verify: str = ""
    target: str = ""


_OPT_IN = (
    ("default", "compress"),
    ("default", "weightless"),
    ("default", "cancel"),
    ("default", "depth_scale"),
    ("default", "l1"),
    ("cleanup", "expose", "affine", "realise"),
    ("bake", "recognise", "mean_free", "realise", "cleanup"),
)
_NORMS = {
    "image": ("batch_norm2d", "batch_norm2d", "group_norm", "channel_norm", "family_image_norm", "instance_norm"),
    "tokens": ("layer_norm", "layer_norm", "rms_norm", "written_norm", "functional_norm", "family_token_norm"),
    "sequence": ("batch_norm1d", "group_norm"),
    "volume": ("batch_norm3d", "instance_norm"),
    "table": ("layer_norm", "rms_norm", "batch_norm_table"),
}
_MIXERS = {
    "image": ("depthwise_conv", "rep_vgg", "squeeze_excite", "conv2d", "activation"),
    "tokens": ("same_linear", "mlp", "gated_mlp", "attention", "attention", "token_mixing", "multihead_attention"),
    "sequence": ("conv1d", "activation"),
    "volume": ("conv3d", "activation"),
    "table": ("linear", "activation", "affine_parameters"),
}


_PRODUCTS = {"image": "conv2d", "tokens": "linear", "sequence": "conv1d", "volume": "conv3d", "table": "linear"}


def generate(seed: int, options: Options = Options()) -> Spec:
    """The same spec for the same seed and options."""
    rng = random.Random(seed)
    dtype = options.dtype or rng.choices(DTYPES, (6, 2, 2, 2))[0]
    mode = _mode(rng, options, dtype)
    inputs = _inputs(rng, mode)
    emitter = Emitter(dtype, inputs, seed)
    draft = _Draft(rng, emitter)
    for _ in range(rng.randint(1, 4)):
        draft.motif()
    for i in inputs:  # every argument is read
        if i.kind in ("number", "flag"):
            draft.step(f"use_{i.kind}", [draft.last("float"), emitter.values[i.name]])
        elif i.given and not any(i.name in s.reads for s in draft.steps):
            draft.grow(emitter.values[i.name])
    if rng.random() < 0.4:
        draft.end()
    draft.emitter = draft.again()
    structure = rng.choices(list(STRUCTURES), (10, 3, 1, 1, 2, 1, 1, 1, 1, 1))[0]
    return Spec(seed, dtype, inputs, tuple(draft.steps), _outputs(rng, draft, structure), structure, mode)


def _mode(rng: random.Random, options: Options, dtype: str) -> Mode:
    with_inputs = rng.random() >= options.without_inputs
    verify = options.verify or rng.choices(("off", "end", "each"), (12, 6, 1))[0]
    dynamic = rng.choice(("batch", "batch", "batch and size")) if rng.random() < options.dynamic_share and with_inputs else ""
    passes, quantize, export = None, None, ""
    if with_inputs and rng.random() < options.quantize_share and dtype == "float32":
        quantize = rng.choice(((8, 8), (4, 8)))
    elif rng.random() < options.passes_share:
        passes = rng.choice(_OPT_IN)
    if with_inputs and rng.random() < options.export_share:
        drawn = rng.choice(("onnxruntime", "portable"))
        export = options.target or drawn
    return Mode(verify, with_inputs, rng.random() < 0.2, dynamic, passes, quantize, export)


def _inputs(rng: random.Random, mode: Mode) -> tuple[Input, ...]:
    batch, length, side = rng.choice((2, 2, 3)), rng.choice((3, 4, 9)), rng.choice((4, 6, 8))
    width = rng.choice((4, 6, 8))
    shapes = {
        "image": (batch, rng.choice((3, 4, 6)), side, side), "tokens": (batch, length, width), "sequence": (batch, width, 8),
        "table": (batch, width), "volume": (batch, 2, 4, 4, 4), "ids": (batch, length),
    }  # fmt: skip
    kinds = rng.choices(list(shapes), (8, 8, 3, 3, 1, 3), k=1)
    if rng.random() < 0.3:
        kinds.append(rng.choice([kinds[0], *shapes]))
    found = [Input("x" if n == 0 else "yz"[n - 1], k, shapes[k]) for n, k in enumerate(kinds)]
    if kinds[0] != "ids" and rng.random() < 0.15:
        found.append(Input("extra", kinds[0], shapes[kinds[0]], optional=True, given=rng.random() < 0.6))
    if all(i.given for i in found) and rng.random() < 0.15:
        found.append(Input("n", "number", value=rng.choice((2, 3, 0.5)), given=rng.random() < 0.7))
    if all(i.given for i in found) and rng.random() < 0.1:
        found.append(Input("flag", "flag", value=rng.random() < 0.5, given=rng.random() < 0.7))
    return tuple(found)


class _Draft:
    """Steps so far; what a step makes that does not run is forgotten."""

    def __init__(self, rng: random.Random, emitter: Emitter) -> None:
        self.rng, self.emitter = rng, emitter
        self.steps: list[Step] = []

    def step(self, name: str, values: list[Value | None]) -> Value | None:
        if any(v is None for v in values):
            return None
        step = Step(f"v{len(self.steps)}", name, tuple(v.name for v in values if v is not None), self.rng.getrandbits(32))
        try:
            value = self.emitter.apply(step)
        except Invalid:
            return None
        self.steps.append(step)
        return value

    def again(self) -> Emitter:
        """The same steps without the tries in between, so that parameters have the names that they will have."""
        emitter = Emitter(self.emitter.dtype, self.emitter.inputs, self.emitter.seed)
        for step in self.steps:
            emitter.apply(step)
        return emitter

    def last(self, kind: str) -> Value | None:
        """A value that may be read, most often the newest."""
        found = [v for v in self.emitter.values.values() if v.kind not in ("number", "flag", "missing", "end")]
        found = [v for v in found if (v.kind != "ids") or kind != "float"]
        if not found:
            return None
        return found[-1] if self.rng.random() < 0.75 else self.rng.choice(found[-4:])

    def grow(self, x: Value) -> Value | None:
        """One random block that reads `x`."""
        for _ in range(12):
            found = [b for b in BLOCKS.values() if b.gives != "end" and accepts(b.reads[0], x, x)]
            if not found:
                return None
            chosen = self.rng.choices(found, [b.weight for b in found])[0]
            rest: list[Value | None] = [x, *(self._partner(kind, x) for kind in chosen.reads[1:])]
            value = self.step(chosen.name, rest)
            if value is not None:
                return value
        return None

    def _partner(self, kind: str, x: Value) -> Value | None:
        of_kind = [v for v in self.emitter.values.values() if v.kind not in ("missing", "end") and (v.kind == kind or
                   (kind == "same" and v.kind == x.kind) or (kind == "float" and v.kind in _NORMS))]  # fmt: skip
        alike = [v for v in of_kind if kind == "same" and v.shape == x.shape and v.name != x.name]
        return self.rng.choice(alike or of_kind) if of_kind else None

    def motif(self) -> None:
        """A residual block, a norm before or behind a product, parallel branches, or just a few steps."""
        x = self.last("any")
        if x is None:
            return
        if x.kind == "ids":
            x = self.step("embedding", [x]) or self.grow(x)
            if x is None or x.kind == "ids":
                return
        rng = self.rng
        match rng.choices(("residual", "post", "sandwich", "branches", "steps"), (2, 1, 2, 1, 4))[0]:
            case "residual":
                y = self.step(rng.choice(_NORMS[x.kind]), [x])
                z = self.step(rng.choice(_MIXERS[x.kind]), [y])
                if z is not None and rng.random() < 0.2:
                    z = self.step("layer_scale", [z]) or z
                self.step("add", [x, z])
            case "post":
                z = self.step(rng.choice(_MIXERS[x.kind]), [x])
                self.step(rng.choice(_NORMS[x.kind]), [self.step("add", [x, z])])
            case "sandwich":
                y = self.step(_PRODUCTS[x.kind], [x])
                y = y and self.step(rng.choice(_NORMS[y.kind]), [y])
                y = (y and rng.random() < 0.6 and self.grow(y)) or y
                if y is not None and y.kind in _MIXERS:
                    self.step(_PRODUCTS[y.kind], [y])
            case "branches":
                y = self.step(rng.choice(_NORMS[x.kind]), [x]) or x
                a, b = self.step(rng.choice(_MIXERS[x.kind]), [y]), self.step(rng.choice(_MIXERS[x.kind]), [y])
                self.step(rng.choice(("add", "multiply")), [a, b])
            case _:
                for _ in range(rng.randint(1, 4)):
                    y = self.last("any")
                    if y is not None:
                        self.grow(y)

    def end(self) -> None:
        x = self.last("any")
        found = [b for b in BLOCKS.values() if b.gives == "end" and x is not None and accepts(b.reads[0], x, x)]
        if found and x is not None:
            self.step(self.rng.choice(found).name, [x])


def _outputs(rng: random.Random, draft: _Draft, structure: str) -> tuple[str, ...]:
    """The newest value first; then others, an input or a weight now and then."""
    names = [s.name for s in draft.steps] or [i.name for i in draft.emitter.inputs if i.given and i.is_tensor]
    ends = [v.name for v in draft.emitter.values.values() if v.kind == "end"]
    values = [n for n in names if n not in ends] or names
    wanted = {"nested": 3, "tensor": 1, "tuple of one": 1, "with none": 1, "with number": 1}.get(structure, 2)
    found = [values[-1]]
    while len(found) < wanted:
        draw = rng.random()
        if ends and ends[-1] not in found:
            found.append(ends[-1])
        elif draw < 0.1:
            found.append(rng.choice([i.name for i in draft.emitter.inputs if i.given and i.is_tensor]))
        elif draw < 0.2 and draft.emitter.parameters:
            found.append(rng.choice(draft.emitter.parameters))
        else:
            found.append(rng.choice(values))
    return tuple(found)
