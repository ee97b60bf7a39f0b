"""Building blocks over any floats: activations, affines, sums, casts, writes in place, decisions, numbers; and side outputs."""

from __future__ import annotations

from tests.fuzz.emit import Emitter, Value, block

_SCALES = (0.5, 2, -1.5, 3, 0.1, "math.sqrt(2)")


@block("float", weight=5)
def activation(e: Emitter, x: Value) -> str:
    plain = (
        "F.relu",
        "F.gelu",
        "F.silu",
        "torch.tanh",
        "torch.sigmoid",
        "F.hardswish",
        "F.hardsigmoid",
        "F.leaky_relu",
        "F.elu",
        "F.selu",
        "F.softplus",
        "F.mish",
        "F.relu6",
        "F.softsign",
        "F.logsigmoid",
        "F.celu",
        "torch.erf",
        "torch.sin",
        "F.tanhshrink",
    )
    modules = (
        "nn.ReLU()",
        "nn.GELU('tanh')",
        "nn.SiLU()",
        "nn.LeakyReLU(0.2)",
        "nn.Hardtanh(-1, 2)",
        "nn.PReLU()",
        "nn.Softplus(2.0)",
        "nn.ELU(0.5)",
    )
    match e.pick("plain", "plain", "module", "prelu", "method", "other"):
        case "plain":
            return f"{e.pick(*plain)}({x})"
        case "module":
            return f"{e.module(e.pick(*modules), 'act')}({x})"
        case "prelu" if x.kind in ("image", "sequence", "volume"):
            return f"{e.module(f'nn.PReLU({x.width})', 'act')}({x})"
        case "method" | "prelu":
            return f"{x}.{e.pick('relu', 'sigmoid', 'tanh')}()"
        case _:
            return e.pick(
                f"{x} * torch.sigmoid(1.702 * {x})",
                f"torch.softmax({x}, -1)",
                f"F.log_softmax({x}, dim=1)",
                f"F.relu({x}).square()",
                f"{x} * F.relu6({x} + 3) / 6",
            )


@block("float", weight=3)
def affine_parameters(e: Emitter, x: Value) -> str:
    """Gains and biases as parameters of several shapes."""
    shape = e.pick(x.channel_shape, (1, *x.channel_shape), x.channel_shape, (), (1,), x.shape[1:])
    g, b = e.gain(shape), e.parameter(shape)
    return e.pick(
        f"{x} * {g}",
        f"{x} + {b}",
        f"{g} * {x} + {b}",
        f"{x} - {b}",
        f"{b} - {x}",
        f"{x} / {g}",
        f"({x} - {b}) * {g}",
        f"{x}.mul({g}).add({b})",
        f"torch.addcmul({b}, {x}, {g})",
        f"torch.add({x}, {b}, alpha=2)",
        f"{x} * {g}.abs() * 2",
        f"({x} - {b}) / ({g} * {g} + 1e-5).sqrt()",
    )


@block("float", weight=1.5)
def affine_of_another_dtype(e: Emitter, x: Value) -> str:
    dtype = e.pick("float32", "float64", "float16")
    shape = e.pick(x.channel_shape, (1, *x.channel_shape), ())
    g = e.gain(shape, dtype=dtype)
    return e.pick(
        f"{x} * {g}", f"{x} + {g}", f"({x} * {g}).to({x}.dtype)", f"{x} * {g}.to({x}.dtype)", f"{x}.float() * {g}.float()"
    )


@block("float", weight=2)
def literal_affine(e: Emitter, x: Value) -> str:
    s = e.pick(*_SCALES)
    return e.pick(
        f"{x} * {s}",
        f"{s} * {x}",
        f"{x} + {s}",
        f"{x} - {s}",
        f"{s} - {x}",
        f"{x} / {s}",
        f"-{x}",
        f"{x}.mul({s})",
        f"torch.add({x}, {x}, alpha={s})",
        f"{x} * {s} + 1",
        f"({x} - 0.5) / 0.25",
        f"torch.neg({x})",
        f"{x} * {x.width} ** -0.5",
        f"torch.rsub({x}, 1)",
        f"{x}.div({s})",
    )


@block("float", weight=1.5)
def layer_scale(e: Emitter, x: Value) -> str:
    return f"{x} * {e.gain(x.channel_shape)}"


@block("float", "same", weight=6)
def add(e: Emitter, x: Value, y: Value) -> str:
    return e.pick(
        f"{x} + {y}",
        f"{x} + {y}",
        f"{x} - {y}",
        f"{y} - {x}",
        f"{x} + {y} * 0.5",
        f"{x} + {e.gain(x.channel_shape)} * {y}",
        f"torch.add({x}, {y}, alpha=0.5)",
        f"({x} + {y}) / 2",
        f"{x} + {e.gain(x.channel_shape)} * ({y} - {x})",
        f"torch.stack([{x}, {y}]).sum(0)",
        f"torch.lerp({x}, {y}, 0.3)",
    )


@block("float", "same", weight=1.5)
def multiply(e: Emitter, x: Value, y: Value) -> str:
    return e.pick(
        f"{x} * {y}",
        f"{x} * torch.sigmoid({y})",
        f"torch.maximum({x}, {y})",
        f"torch.minimum({x}, {y})",
        f"F.silu({x}) * {y}",
        f"torch.stack(({x}, {y}), -1).amax(-1)",
    )


@block("float")
def nothing(e: Emitter, x: Value) -> str:
    """What changes no value in eval mode."""
    drop = e.module(f"nn.{e.pick('Dropout', 'AlphaDropout', 'Identity')}(0.1)", "drop")
    return e.pick(
        f"{drop}({x})",
        f"F.dropout({x}, 0.5, self.training)",
        f"{x}.contiguous()",
        f"{x}.clone()",
        f"{x}.detach()",
        f"{x}.view({x}.shape)",
        f"{x}.reshape({x}.shape)",
        f"{x}[...]",
        f"{x} + 0",
        f"{x} * 1",
        f"{x}.to({x}.dtype)",
        f"{x}.expand_as({x})",
        f"{x}.unsqueeze(0).squeeze(0)",
        f"torch.cat([{x}])",
        f"{x}.float().to({x}.dtype)",
    )


@block("float", weight=1.5)
def write_in_place(e: Emitter, x: Value) -> str | None:
    if not e.fresh(x):
        return None
    match e.pick("call", "call", "view", "slice", "masked", "clone", "argument", "einsum", "index"):
        case "call":
            return e.pick(
                f"F.relu({x}, inplace=True)",
                f"{x}.relu_()",
                f"{x}.add_(1)",
                f"{x}.mul_(0.5)",
                f"{x}.mul_({e.gain(x.channel_shape)})",
                f"{x}.add_({x})",
                f"{x}.sigmoid_()",
                f"{x}.clamp_(-1, 2)",
                f"torch.relu_({x})",
                f"{x}.neg_()",
                f"{x}.div_(2)",
                f"{x}.sub_({e.parameter(x.channel_shape)})",
            )
        case "view":
            t = e.local(
                e.pick(
                    f"{x}[:, :1]",
                    f"{x}.flatten(1)",
                    f"{x}.view(-1)",
                    f"{x}.transpose(0, 1)",
                    f"{x}[0]",
                    f"{x}.detach()",
                    f"{x}.chunk(2, 1)[0]",
                )
            )
            e.line(f"{t}.{e.pick('mul_(2)', 'relu_()', 'zero_()', 'add_(1)', 'copy_(-' + t + ')')}")
            return f"{x} * 1.5"
        case "slice":
            e.line(
                e.pick(f"{x}[:, 0] = 0", f"{x}[:, :1] *= 2", f"{x}[..., 0] += 1", f"{x}[:, 0] = {x}[:, -1]", f"{x}[0] = -{x}[0]")
            )
            return f"{x}"
        case "masked":
            return e.pick(
                f"{x}.masked_fill_({x} > 1, 0.5)",
                f"{x}.masked_fill({x} < 0, 0.0)",
                f"{x}.fill_diagonal_(0)" if x.kind == "table" else f"{x}.zero_() + 1",
            )
        case "clone":
            t = e.local(f"{x}.clone()")
            e.line(f"{t}[:, 0] = 0")
            return f"{t} + {x}"
        case "argument":
            return f"torch.mul({x}, 2, out=torch.empty_like({x}))" if e.flag(0.1) else f"{x}.index_fill(1, torch.tensor([0]), 0.5)"
        case "einsum":
            letters = "abcde"[: len(x.shape)]
            t = e.local(
                e.pick(
                    f"torch.einsum('{letters}->{letters}', {x})",
                    f"torch.meshgrid({x}.flatten(), indexing='ij')[0]",
                    f"torch.broadcast_tensors({x}, {x})[0]",
                )
            )
            e.line(f"{t}.relu_()")
            return f"{x} + 1"
        case _:
            e.line(f"{x}.index_put_((torch.tensor([0]),), torch.ones((), dtype={x}.dtype))")
            return f"{x}"


@block("float")
def casts(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.float()",
        f"{x}.double()",
        f"{x}.to(torch.float32)",
        f"{x}.double().to({x}.dtype)",
        f"{x}.half().to({x}.dtype)",
        f"{x}.bfloat16().to({x}.dtype)",
        f"{x}.type_as({e.buffer('torch.zeros(1)')})",
        f"({x} * 8).to(torch.int64).to({x}.dtype)",
        f"{x}.to(torch.float32, copy=True)",
    )


@block("float", decides=True)
def where(e: Emitter, x: Value) -> str:
    return e.pick(
        f"torch.where({x} > 0.5, {x}, {e.pick('0.0', '-1.0', f'{x} * 2', f'torch.zeros_like({x})')})",
        f"{x} * ({x} > 0)",
        f"{x}.masked_fill({x} < -0.5, 2.0)",
        f"torch.where({x}.abs() < 1, {x} * {x}, {x}.abs())",
        f"{x} * ({x}.mean() > 0).to({x}.dtype)",
        f"{x} + ({x} >= {e.parameter(x.channel_shape)}).to({x}.dtype)",
    )


@block("float", decides=True, weight=0.7)
def rounding(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.floor()",
        f"({x} * 4).round() / 4",
        f"{x}.trunc() + {x}",
        f"torch.frac({x})",
        f"torch.sign({x}) * {x}",
        f"{x} % 1.5",
        f"torch.ceil({x}) - {x}",
    )


@block("float")
def constant_table(e: Emitter, x: Value) -> str:
    """Constants that are computed in the forward pass; some with a rounding that decides."""
    c = x.width
    table = e.buffer(f"torch.arange(0, {c}, 1.0)")
    tail = "".join(", 1" for _ in x.channel_shape[1:])
    t = e.local(
        e.pick(
            f"({table} * 0.1 * 10).floor()",
            f"torch.where({table} * 0.1 + 0.2 == 0.3, 2.0, 0.5)",
            f"{table}.sin() + 1",
            f"torch.isinf({table} * 1e4).to({x}.dtype) + 1",
            f"({table} / 3).long().to({x}.dtype)",
            f"torch.linspace(0, 1, {c}, dtype={x}.dtype)",
            f"torch.arange({c}, dtype={x}.dtype) / {c}",
            f"torch.ones({c}, dtype={x}.dtype).cumsum(0)",
            f"torch.full(({c},), 0.5)",
            f"torch.eye({c}, dtype={x}.dtype)[0]",
            f"torch.tensor([1.5] * {c})",
            f"torch.zeros({c}) + 1",
            f"(torch.arange({c}) % 2) / 2",
            f"{table} / {table}.sum()",
            f"torch.exp(torch.arange({c}) * -0.3)",
        )
    )
    return f"{x} {e.pick('*', '+')} {t}.reshape({c}{tail})"


@block("float", weight=0.5)
def enlarging_constant(e: Emitter, x: Value) -> str:
    """A constant that is larger than what it is added to."""
    wide = tuple(3 if n == 1 else n for n in x.shape)
    if wide == x.shape:
        return f"({x}.mean(1, keepdim=True) {e.pick('+', '*')} {e.parameter((1, *x.shape[1:]))})"
    return f"{x} {e.pick('+', '*')} {e.parameter((1, *wide[1:]))}"


@block("float", weight=0.4)
def lazy_views(e: Emitter, x: Value) -> str | None:
    """A buffer and its conjugate or negative view, which share their memory."""
    if e.dtype in ("float16", "bfloat16"):
        return None
    c = x.width
    tail = "".join(", 1" for _ in x.channel_shape[1:])
    f = e.buffer(f"torch.randn({c}, dtype=torch.complex64)")
    g = e.buffer(f"{f}.conj()")
    return f"({x} * {f}.reshape({c}{tail}) + 2 * {x} * {g}.reshape({c}{tail})).imag.to({x}.dtype)"


@block("float")
def arithmetic(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x} * {x}",
        f"{x}.abs()",
        f"{x}.clamp(-1, 1)",
        f"torch.clamp({x}, min=0)",
        f"{x}.pow(2)",
        f"{x} ** 3",
        f"({x}.abs() + 1e-3).sqrt()",
        f"torch.exp(-{x}.abs())",
        f"{x} - {x}.mean(-1, keepdim=True)",
        f"{x} - {x}.mean(1, keepdim=True)",
        f"{x} / ({x}.abs().amax(-1, keepdim=True) + 1)",
        f"{x}.cumsum(-1)",
        f"torch.log1p({x}.abs())",
        f"torch.clamp({x}, {e.buffer('torch.tensor(-1.0)')}, {e.buffer('torch.tensor(1.0)')})",
        f"1 / ({x}.square() + 1)",
        f"{x}.sum(1, keepdim=True) / {x}.shape[1]",
        f"{x} * {x}.shape[-1] ** -0.5",
        f"{x}.sort(-1).values",
        f"torch.sort({x}, dim=1, descending=True)[0]",
        f"{x}.logsumexp(-1, keepdim=True) + {x}",
        f"torch.atan2({x}, {x}.abs() + 1)",
        f"{x}.nan_to_num()",
        f"torch.diff({x}, dim=-1)",
        f"{x}.var(-1, keepdim=True) * {x}",
        f"{x} - {x}.amin()",
    )


@block("float", weight=0.7)
def python_condition(e: Emitter, x: Value) -> str:
    """Python code that looks at sizes and types."""
    return e.pick(
        f"{x} * 2 if {x}.shape[1] > 4 else {x} - 1",
        f"{x} if {x}.ndim == 4 else {x} + 1",
        f"{x} * len({x})",
        f"{x} + {x}.size(-1) / 4",
        f"{x}.sum(1, keepdim=True) / {x}.size(1)",
        f"{x} + 1 if {x}.dtype == torch.float32 else {x}",
        f"{x} * {x}.numel() ** -0.5",
        f"{x} + (1 if self.training else 2)",
        f"{x} * ({x}.shape[0] + {x}.shape[1])",
    )


@block("float", "number", weight=3)
def use_number(e: Emitter, x: Value, n: Value) -> str:
    return e.pick(
        f"{x} * {n}",
        f"{x} + {n}",
        f"{x} * {n} if {n} > 1 else {x}",
        f"sum([{x}] * int({n}))",
        f"{x} / ({n} + 1)",
        f"{x}.roll(int({n}), 1)",
    )


@block("float", "flag", weight=3)
def use_flag(e: Emitter, x: Value, flag: Value) -> str:
    return e.pick(f"{x} if {flag} else -{x}", f"F.relu({x}) if {flag} else {x}", f"{x} * (2 if not {flag} else 1)")


@block("float", "float", weight=0.5)
def add_broadcast(e: Emitter, x: Value, y: Value) -> str | None:
    """A gate or a condition of one number a channel and image: FiLM and its like."""
    if y.kind != "table" or x.kind == "table":
        return None
    fc = e.module(f"nn.Linear({y.width}, {2 * x.width})", "film")
    axes = (
        "[:, :, None, None]"
        if x.kind == "image"
        else "[:, :, None]"
        if x.kind == "sequence"
        else "[:, None]"
        if x.kind == "tokens"
        else ""
    )
    if not axes:
        return None
    s, b = e.local(f"{fc}({y})[:, :{x.width}]{axes}"), e.local(f"{fc}({y})[:, {x.width}:]{axes}")
    return f"{x} * (1 + {s}) + {b}"


# -- values for the outputs alone --------------------------------------------------------------------------------------


@block("float", gives="end", weight=0.7, decides=True)
def decision(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.argmax(-1)",
        f"{x} > 0",
        f"({x} > 0).sum(1)",
        f"torch.count_nonzero({x}, 1)",
        f"torch.topk({x}, 2, -1).indices",
        f"{x}.argsort(-1)",
        f"{x}.max(1).indices",
        f"({x} * 4).long()",
        f"({x} * 4).round().to(torch.int32)",
        f"({x} > 0).any(-1)",
        f"torch.isnan({x})",
        f"{x}.topk(1, dim=1)[1]",
    )


@block("float", gives="end", weight=0.7)
def summary_value(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.mean()",
        f"{x}.sum()",
        f"{x}.topk(2, -1).values",
        f"{x}.shape[1]",
        f"{x}.amax(-1)",
        f"{x}.norm()",
        f"{x}.flatten()",
        f"{x}.square().mean(-1)",
        f"torch.count_nonzero({x}.abs() > -1, 1) * 1.0",
        f"{x}.std(-1)",
        f"{x}.double().mean()",
        f"{x}.sum(dtype=torch.float64)",
        f"{x}.unsqueeze(0)",
        f"{x}.detach()",
        f"{x}[0]",
    )


@block("ids", gives="end", weight=0.4)
def integer_output(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.sum(1)", f"{x} + 1", f"({x} > 3)", f"{x}.flip(0)", f"{x}.float().mean()", f"{x}.clone()", f"{x}.max(1).values"
    )
