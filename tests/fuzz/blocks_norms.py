"""Building blocks that normalize: PyTorch's layers, the functional forms, those that people write out, and `normfuse.nn`."""

from __future__ import annotations

from tests.fuzz.emit import Emitter, Value, block

# -- over channels of images, sequences and volumes --------------------------------------------------------------------


def _batch_norm(e: Emitter, x: Value, axes: int) -> str:
    options = e.pick("", "", "", "", ", affine=False", ", eps=1e-3", ", track_running_stats=False")
    return f"{e.module(f'nn.BatchNorm{axes}d({x.width}{options})', 'bn', x)}({x})"


@block("image", weight=6)
def batch_norm2d(e: Emitter, x: Value) -> str:
    return _batch_norm(e, x, 2)


@block("sequence", weight=6)
def batch_norm1d(e: Emitter, x: Value) -> str:
    return _batch_norm(e, x, 1)


@block("table", weight=3)
def batch_norm_table(e: Emitter, x: Value) -> str:
    return _batch_norm(e, x, 1)


@block("volume", weight=6)
def batch_norm3d(e: Emitter, x: Value) -> str:
    return _batch_norm(e, x, 3)


@block("tokens")
def batch_norm_tokens(e: Emitter, x: Value) -> str:
    norm = e.module(f"nn.BatchNorm1d({x.width})", "bn")
    return e.pick(f"{norm}({x}.transpose(1, 2)).transpose(1, 2)", f"{norm}({x}.flatten(0, 1)).view({x}.shape)")


@block("image")
def functional_batch_norm(e: Emitter, x: Value) -> str:
    c = x.width
    mean, var = e.buffer(f"torch.randn({c})"), e.buffer(f"torch.rand({c}) + 0.5")
    affine = f", {e.gain((c,))}, {e.parameter((c,))}" if e.flag() else ""
    return f"F.batch_norm({x}, {mean}, {var}{affine})"


@block("image")
def frozen_batch_norm(e: Emitter, x: Value) -> str:
    """As detection models write it."""
    c = x.width
    w, b = e.buffer(f"torch.rand({c}) - 0.3"), e.buffer(f"torch.randn({c})")
    m, v = e.buffer(f"torch.randn({c})"), e.buffer(f"torch.rand({c}) + 0.5")
    s = e.local(f"({w} * ({v} + 1e-5).rsqrt()).reshape(1, -1, 1, 1)")
    t = e.local(f"{b}.reshape(1, -1, 1, 1) - {m}.reshape(1, -1, 1, 1) * {s}")
    return f"{x} * {s} + {t}"


@block("image", weight=0.4)
def sync_batch_norm(e: Emitter, x: Value) -> str:
    return f"{e.module(f'nn.SyncBatchNorm({x.width})', 'norm')}({x})"


@block("float")
def group_norm(e: Emitter, x: Value) -> str | None:
    if x.kind in ("tokens", "table"):
        return None
    groups = e.pick(1, 2, x.width)
    if x.width % groups:
        return None
    if e.flag(0.3):
        return f"F.group_norm({x}, {groups}, {e.gain((x.width,))}, {e.parameter((x.width,))})"
    affine = e.pick("", "", ", affine=False")
    return f"{e.module(f'nn.GroupNorm({groups}, {x.width}{affine})', 'norm', x)}({x})"


@block("float")
def instance_norm(e: Emitter, x: Value) -> str | None:
    axes = {"image": 2, "sequence": 1, "volume": 3}.get(x.kind)
    if axes is None:
        return None
    options = e.pick("", ", affine=True", ", affine=True, track_running_stats=True", ", track_running_stats=True")
    return f"{e.module(f'nn.InstanceNorm{axes}d({x.width}{options})', 'norm')}({x})"


@block("image")
def layer_norm_image(e: Emitter, x: Value) -> str:
    affine = e.pick("", ", elementwise_affine=False")
    return f"{e.module(f'nn.LayerNorm({list(x.shape[1:])}{affine})', 'norm')}({x})"


@block("image", weight=1.5)
def channel_norm(e: Emitter, x: Value) -> str:
    """LayerNorm over the channels, in the spellings of ConvNeXt."""
    c = x.width
    if e.flag():
        norm = e.module(f"nn.{e.pick('LayerNorm', 'RMSNorm')}({c}, eps=1e-6)", "norm")
        return f"{norm}({x}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    u = e.local(f"{x}.mean(1, keepdim=True)")
    s = e.local(f"({x} - {u}).pow(2).mean(1, keepdim=True)")
    h = e.local(f"({x} - {u}) / torch.sqrt({s} + 1e-6)")
    return f"{e.gain((c,))}[:, None, None] * {h} + {e.parameter((c,))}[:, None, None]"


@block("image", weight=1.5)
def family_image_norm(e: Emitter, x: Value) -> str:
    c = x.width
    made = e.pick(
        f"nnn.L1BatchNorm({c})",
        f"nnn.BatchChannelNorm({c}, groups=2)",
        f"nnn.EvoNorm('S1', {c}, groups=2, apply_act=False)",
        f"nnn.EvoNorm('S0', {c}, groups=2)",
        f"nnn.EvoNorm('B0', {c})",
        f"nnn.AlphaBatchNorm({c})",
        f"nnn.UnifiedNorm({c})",
        f"nnn.DynamicTanh({c}, channels_last=False)",
        f"nnn.RegionNormL({c})",
    )
    return f"{e.module(made, 'norm')}({x})"


@block("image", weight=0.5)
def response_norms(e: Emitter, x: Value) -> str:
    """Filter response normalization, global response normalization, local response normalization."""
    shape = (1, x.width, 1, 1)
    match e.pick("frn", "grn", "lrn"):
        case "frn":
            h = e.local(f"{x} * torch.rsqrt({x}.pow(2).mean((2, 3), keepdim=True) + 1e-3)")
            return f"torch.max({e.gain(shape)} * {h} + {e.parameter(shape)}, {e.parameter(shape)})"
        case "grn":
            g = e.local(f"{x}.norm(p=2, dim=(2, 3), keepdim=True)")
            n = e.local(f"{g} / ({g}.mean(1, keepdim=True) + 1e-6)")
            return f"{e.gain(shape)} * ({x} * {n}) + {e.parameter(shape)} + {x}"
        case _:
            return f"F.local_response_norm({x}, 3)"


# -- over features of tokens and tables --------------------------------------------------------------------------------


def _features(x: Value) -> bool:
    return x.kind in ("tokens", "table") and x.width > 1


@block("float", weight=5)
def layer_norm(e: Emitter, x: Value) -> str | None:
    if not _features(x):
        return None
    options = e.pick("", "", "", "", ", elementwise_affine=False", ", bias=False", ", eps=1e-3")
    return f"{e.module(f'nn.LayerNorm({x.width}{options})', 'norm', x)}({x})"


@block("float", weight=4)
def rms_norm(e: Emitter, x: Value) -> str | None:
    if not _features(x):
        return None
    options = e.pick("", "", ", eps=1e-6", ", elementwise_affine=False")
    return f"{e.module(f'nn.RMSNorm({x.width}{options})', 'norm', x)}({x})"


@block("float")
def functional_norm(e: Emitter, x: Value) -> str | None:
    if not _features(x):
        return None
    d = x.width
    return e.pick(
        f"F.layer_norm({x}, ({d},))",
        f"F.layer_norm({x}, ({d},), {e.gain((d,))}, {e.parameter((d,))})",
        f"F.layer_norm({x}, [{d}], weight={e.gain((d,))})",
        f"F.rms_norm({x}, ({d},))",
        f"F.rms_norm({x}, ({d},), {e.gain((d,))}, 1e-6)",
        f"F.rms_norm({x}.float(), ({d},), {e.gain((d,))}.float()).to({x}.dtype)",
        f"F.normalize({x}, dim=-1)",
    )


@block("float", weight=3)
def written_norm(e: Emitter, x: Value) -> str | None:
    """LayerNorm and RMSNorm as Llama, T5, Gemma and others write them."""
    if not _features(x):
        return None
    g = e.gain((x.width,))
    match e.pick("llama", "llama cast inside", "t5", "gemma", "layer norm", "variance", "std", "two dtypes", "sqrt"):
        case "llama":
            v = e.local(f"{x}.pow(2).mean(-1, keepdim=True)")
            return f"{g} * ({x} * torch.rsqrt({v} + 1e-6))"
        case "llama cast inside":
            h = e.local(f"{x}.to(torch.float32)")
            v = e.local(f"{h}.pow(2).mean(-1, keepdim=True)")
            return f"{g} * ({h} * torch.rsqrt({v} + 1e-5)).to({x}.dtype)"
        case "t5":
            v = e.local(f"{x}.to(torch.float32).pow(2).mean(-1, keepdim=True)")
            h = e.local(f"{x} * torch.rsqrt({v} + 1e-6)")
            return f"{g} * {h}.to({g}.dtype)"
        case "gemma":
            h = e.local(f"{x}.float() * torch.rsqrt({x}.float().pow(2).mean(-1, keepdim=True) + 1e-6)")
            return f"({h} * (1.0 + {g}.float())).type_as({x})"
        case "layer norm":
            m = e.local(f"{x}.mean(-1, keepdim=True)")
            v = e.local(f"({x} - {m}).square().mean(-1, keepdim=True)")
            return f"({x} - {m}) / ({v} + 1e-5).sqrt() * {g} + {e.parameter((x.width,))}"
        case "variance":
            m = e.local(f"{x}.mean(-1, keepdim=True)")
            v = e.local(f"{x}.var(-1, keepdim=True, unbiased={e.flag(0.3)})")
            return f"{g} * ({x} - {m}) / torch.sqrt({v} + 1e-5) + {e.parameter((x.width,))}"
        case "std":
            m = e.local(f"{x}.mean(dim=-1, keepdim=True)")
            return f"{g} * ({x} - {m}) / ({x}.std(-1, keepdim=True) + 1e-6) + {e.parameter((x.width,))}"
        case "two dtypes":
            h = e.local(f"{x}.float()")
            return f"{h} * torch.rsqrt({h}.square().mean(-1, True) + 1e-6) * {e.gain((x.width,), dtype='float32')}"
        case _:
            return f"{x} / ({x}.norm(dim=-1, keepdim=True) * {x.width}**-0.5 + 1e-6) * {g}"


@block("tokens", weight=3)
def family_token_norm(e: Emitter, x: Value) -> str:
    d = x.width
    made = e.pick(
        f"nnn.UnifiedNorm({d})",
        f"nnn.PowerNorm({d}, group_num={2 if d % 2 == 0 else 1})",
        f"nnn.PowerNorm({d}, group_num=0)",
        f"nnn.CRMSNorm({d}, elementwise_affine={e.flag()})",
        f"nnn.ScaledNorm(nn.RMSNorm({d}), 3)",
        f"nnn.ScaledNorm(nn.LayerNorm({d}), 2)",
        f"nnn.L1LayerNorm({d})",
        f"nnn.DynamicTanh({d})",
        f"nnn.DynamicErf({d})",
    )
    return f"{e.module(made, 'norm', x)}({x})"


@block("tokens", weight=0.5)
def norm_of_two_axes(e: Emitter, x: Value) -> str:
    norm = e.pick("nn.LayerNorm", "nn.RMSNorm")
    return f"{e.module(f'{norm}({list(x.shape[1:])})', 'norm')}({x})"
