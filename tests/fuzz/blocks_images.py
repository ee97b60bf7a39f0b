"""Building blocks over images, volumes and sequences: convolutions, pooling, resizing, movements."""

from __future__ import annotations

from tests.fuzz.emit import Emitter, Value, block

_ODD_NAMES = ("graph", "code", "meta", "recompile", "class", "in", "lambda", "it's", "_modules_", "forward_", "weight", "print")


def _conv(e: Emitter, x: Value, axes: int, kind: str = "nn.Conv{}d", **more: object) -> str:
    """Constructor of a convolution with random options."""
    width, out = x.width, e.new_width(x.width)
    groups = e.pick(1, 1, 1, 2, width)
    if width % groups:
        groups = 1
    if groups > 1:
        out = width * e.pick(1, 1, 2)
    size = min(e.pick(1, 3, 3, 2), *x.shape[2:])
    options: dict[str, object] = {"kernel_size": size, "stride": e.pick(1, 1, 1, 2), "groups": groups, "bias": e.flag(0.7)}
    if size == 3:
        options["padding"] = e.pick(0, 1, 1, 2)
        options["dilation"] = e.pick(1, 1, 1, 2)
        options["padding_mode"] = e.pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
        if options["stride"] == 1 and e.flag(0.15):
            options["padding"] = "same"
    options |= more
    usual = {"stride": 1, "groups": 1, "bias": True, "padding": 0, "dilation": 1, "padding_mode": "zeros"}
    said = ", ".join(f"{k}={v!r}" for k, v in options.items() if usual.get(k, "") != v)
    return f"{kind.format(axes)}({width}, {out}, {said})"


@block("image", weight=4)
def conv2d(e: Emitter, x: Value) -> str:
    return f"{e.module(_conv(e, x, 2), 'conv', x)}({x})"


@block("sequence", weight=4)
def conv1d(e: Emitter, x: Value) -> str:
    return f"{e.module(_conv(e, x, 1), 'conv', x)}({x})"


@block("volume", weight=4)
def conv3d(e: Emitter, x: Value) -> str:
    return f"{e.module(_conv(e, x, 3), 'conv', x)}({x})"


@block("image", weight=2)
def pointwise_conv(e: Emitter, x: Value) -> str:
    layer = e.module(f"nn.Conv2d({x.width}, {e.new_width(x.width)}, 1, bias={e.flag()})", "conv", x)
    return f"{layer}({x})"


@block("image", weight=2)
def depthwise_conv(e: Emitter, x: Value) -> str:
    layer = e.module(f"nn.Conv2d({x.width}, {x.width}, 3, padding=1, groups={x.width}, bias={e.flag()})", "conv", x)
    return f"{layer}({x})"


@block("image")
def functional_conv(e: Emitter, x: Value) -> str:
    out = e.new_width(x.width)
    bias = e.parameter((out,)) if e.flag() else "None"
    weight = e.parameter((out, x.width, 3, 3), scale=0.3)
    return f"F.conv2d({x}, {weight}, {bias}, padding={e.pick(0, 1, (1, 0))})"


@block("image")
def conv_transpose2d(e: Emitter, x: Value) -> str:
    groups = e.pick(1, 1, 2) if x.width % 2 == 0 else 1
    out = e.pick(4, 6, 8)
    stride = e.pick(1, 2)
    extra = e.pick(0, 1) if stride == 2 else 0
    options = f"stride={stride}, output_padding={extra}, groups={groups}, bias={e.flag()}"
    layer = e.module(f"nn.ConvTranspose2d({x.width}, {out}, {e.pick(2, 3)}, {options})", "up")
    return f"{layer}({x})"


@block("sequence")
def conv_transpose1d(e: Emitter, x: Value) -> str:
    layer = e.module(f"nn.ConvTranspose1d({x.width}, {e.pick(4, 6)}, 3, stride={e.pick(1, 2)}, padding={e.pick(0, 1)})", "up")
    return f"{layer}({x})"


@block("volume", weight=0.5)
def conv_transpose3d(e: Emitter, x: Value) -> str:
    return f"{e.module(f'nn.ConvTranspose3d({x.width}, 4, 2, stride={e.pick(1, 2)})', 'up')}({x})"


@block("image")
def standardized_conv(e: Emitter, x: Value) -> str:
    return f"{e.module(_conv(e, x, 2, 'nnn.WeightStandardizedConv{}d', kernel_size=min(3, *x.shape[2:]), groups=1), 'conv')}({x})"


@block("image")
def weight_normed_conv(e: Emitter, x: Value) -> str:
    how = e.pick("nn.utils.parametrizations.weight_norm", "nn.utils.parametrizations.spectral_norm")
    conv = _conv(e, x, 2, padding_mode="zeros")
    return f"{e.module(f'{how}({conv})', 'conv')}({x})"


@block("image")
def computed_conv(e: Emitter, x: Value) -> str:
    """A weight that depends on a parameter in the forward pass."""
    weight, mask = (
        e.parameter((x.width, x.width, 1, 1), scale=0.4),
        e.buffer(f"(torch.rand({x.width}, {x.width}, 1, 1) > 0.3) * 1.0"),
    )
    return f"F.conv2d({x}, {weight} * {mask}.to({x}.dtype))"


@block("image", weight=1.5)
def conv_bn_relu(e: Emitter, x: Value) -> str:
    out = e.new_width(x.width)
    act = e.pick("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()", "nn.Hardswish()", "nn.LeakyReLU(0.1)")
    layers = [f"nn.Conv2d({x.width}, {out}, 3, padding=1, bias={e.flag()})", f"nn.BatchNorm2d({out})", act]
    if e.flag(0.3):
        layers = [layers[1].replace(str(out), str(x.width)), layers[2], layers[0]]  # pre-activation
    stage = ", ".join(layers)
    return f"{e.module(f'nn.Sequential({stage})', 'stage')}({x})"


@block("image")
def rep_vgg(e: Emitter, x: Value) -> str:
    c = x.width
    wide = e.module(f"nn.Sequential(nn.Conv2d({c}, {c}, 3, padding=1, bias=False), nn.BatchNorm2d({c}))", "rep")
    point = e.module(f"nn.Sequential(nn.Conv2d({c}, {c}, 1, bias=False), nn.BatchNorm2d({c}))", "rep")
    same = e.module(f"nn.BatchNorm2d({c})", "rep")
    return f"{wide}({x}) {e.pick('+', '+', '-')} {point}({x}) {e.pick('+', '-')} {same}({x})"


@block("image")
def squeeze_excite(e: Emitter, x: Value) -> str:
    c = x.width
    down, up = e.module(f"nn.Conv2d({c}, 4, 1)", "se"), e.module(f"nn.Conv2d(4, {c}, 1)", "se")
    mean = e.pick(f"{x}.mean((2, 3), keepdim=True)", f"F.adaptive_avg_pool2d({x}, 1)")
    gate = e.pick("torch.sigmoid", "F.hardsigmoid")
    return f"{x} * {gate}({up}(F.relu({down}({mean}))))"


@block("image", weight=1.5)
def pool2d(e: Emitter, x: Value) -> str:
    return e.pick(
        f"F.avg_pool2d({x}, 2)",
        f"F.avg_pool2d({x}, 3, 2)",
        f"F.avg_pool2d({x}, 3, stride=1, padding=1)",
        f"F.avg_pool2d({x}, 3, 2, 1, ceil_mode=True, count_include_pad=False)",
        f"F.avg_pool2d({x}, 3, 1, 1, count_include_pad=False)",
        f"F.avg_pool2d({x}, 2, divisor_override=3)",
        f"F.max_pool2d({x}, 3, 2, 1)",
        f"F.max_pool2d({x}, 2)",
        f"F.adaptive_avg_pool2d({x}, 2)",
        f"F.adaptive_avg_pool2d({x}, (1, None))",
        f"F.adaptive_max_pool2d({x}, 2)",
        f"F.lp_pool2d(F.relu({x}) + 0.1, 2, 2)",
        f"{e.module('nn.AvgPool2d(3, stride=2, padding=1)', 'pool')}({x})",
        f"{e.module('nn.MaxPool2d(2)', 'pool')}({x})",
    )


@block("sequence", weight=1.5)
def pool1d(e: Emitter, x: Value) -> str:
    return e.pick(
        f"F.avg_pool1d({x}, 2)",
        f"F.avg_pool1d({x}, 3, 1, 1)",
        f"F.max_pool1d({x}, 2, 1)",
        f"F.adaptive_avg_pool1d({x}, 2)",
        f"F.adaptive_max_pool1d({x}, 1)",
        f"F.avg_pool1d({x}, 3, 2)",
    )


@block("volume", weight=1.5)
def pool3d(e: Emitter, x: Value) -> str:
    return e.pick(
        f"F.avg_pool3d({x}, 2)", f"F.max_pool3d({x}, 2, 1)", f"F.adaptive_avg_pool3d({x}, 2)", f"F.avg_pool3d({x}, 3, 1, 1)"
    )


@block("image")
def resize(e: Emitter, x: Value) -> str:
    return e.pick(
        f"F.interpolate({x}, scale_factor=2)",
        f"F.interpolate({x}, scale_factor=2.0, mode='bilinear', align_corners={e.flag()})",
        f"F.interpolate({x}, size=(5, 7), mode='bicubic')",
        f"F.interpolate({x}, size=(5, 7), mode='bilinear', antialias=True)",
        f"F.interpolate({x}, size=(3, 3), mode='area')",
        f"F.interpolate({x}, size={x}.shape[-2:], mode='nearest-exact')",
        f"{e.module('nn.Upsample(scale_factor=2)', 'up')}({x})",
    )


@block("sequence", weight=0.7)
def resize1d(e: Emitter, x: Value) -> str:
    return e.pick(f"F.interpolate({x}, scale_factor=2)", f"F.interpolate({x}, size=9, mode='linear')")


@block("image", weight=1.5)
def pad2d(e: Emitter, x: Value) -> str:
    return e.pick(
        f"F.pad({x}, (1, 1, 1, 1))",
        f"F.pad({x}, (1, 0, 0, 1), value=0.5)",
        f"F.pad({x}, (1, 1, 1, 1), mode='reflect')",
        f"F.pad({x}, (1, 2, 0, 1), mode='replicate')",
        f"F.pad({x}, (1, 1, 1, 1), mode='circular')",
        f"F.pad({x}, (0, 0, 0, 0, 1, 1))",
        f"{e.module('nn.ZeroPad2d(1)', 'pad')}({x})",
        f"{e.module('nn.ReflectionPad2d(1)', 'pad')}({x})",
    )


@block("sequence", weight=0.7)
def pad1d(e: Emitter, x: Value) -> str:
    return e.pick(f"F.pad({x}, (2, 0))", f"F.pad({x}, (1, 1), mode='reflect')", f"F.pad({x}, (1, 1), mode='circular')")


@block("image")
def shuffle_pixels(e: Emitter, x: Value) -> str | None:
    c, (h, w) = x.width, x.shape[2:]
    options = []
    if c % 4 == 0:
        options += [f"F.pixel_shuffle({x}, 2)", f"F.channel_shuffle({x}, 2)"]
    if h % 2 == w % 2 == 0:
        options += [
            f"F.pixel_unshuffle({x}, 2)",
            f"torch.cat([{x}[:, :, ::2, ::2], {x}[:, :, 1::2, ::2], {x}[:, :, ::2, 1::2], {x}[:, :, 1::2, 1::2]], 1)",
        ]
    if c % 2 == 0:
        options.append(f"{x}.unflatten(1, (2, {c // 2})).transpose(1, 2).flatten(1, 2)")
    return e.pick(*options) if options else None


@block("image")
def move_image(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.flip(3)",
        f"torch.flip({x}, [2, 3])",
        f"torch.roll({x}, (1, -1), (2, 3))",
        f"{x}.roll(1, 1)",
        f"{x}.transpose(2, 3)",
        f"torch.rot90({x}, 1, (2, 3))",
        f"{x}[..., 1:-1, 1:-1]",
        f"{x}[:, :, ::2]",
        f"{x}.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
        f"{x}.contiguous(memory_format=torch.channels_last)",
        f"torch.narrow({x}, 1, 0, {max(1, x.width // 2)})",
        f"torch.cat([c + 1 for c in {x}.chunk(2, 1)], 1)",
        f"{x}.index_select(1, {e.buffer(f'torch.randperm({x.width})')})",
    )


@block("image", "same", weight=1.5)
def dense_concat(e: Emitter, x: Value, y: Value) -> str:
    return e.pick(f"torch.cat([{x}, {y}], 1)", f"torch.cat(({y}, {x}), dim=1)", f"torch.cat([{x}, {y}, {x}], 1)")


@block("image", gives="tokens", weight=1.5)
def to_tokens(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.flatten(2).transpose(1, 2)", f"{x}.permute(0, 2, 3, 1).flatten(1, 2)", f"{x}.flatten(2).mT")


@block("image", gives="tokens")
def patch_embed(e: Emitter, x: Value) -> str:
    return f"{e.module(f'nn.Conv2d({x.width}, 8, 2, 2, bias={e.flag()})', 'patch')}({x}).flatten(2).transpose(1, 2)"


@block("image", gives="tokens", weight=0.7)
def windows(e: Emitter, x: Value) -> str | None:
    """Non-overlapping windows as batch entries."""
    _, c, h, w = x.shape
    if h % 2 or w % 2:
        return None
    t = e.local(f"{x}.permute(0, 2, 3, 1)")
    return f"{t}.reshape({x}.shape[0], {h // 2}, 2, {w // 2}, 2, {c}).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, {c})"


@block("image", gives="tokens", weight=0.5)
def unfold(e: Emitter, x: Value) -> str:
    return f"F.unfold({x}, 2, stride=2).transpose(1, 2)"


@block("image", gives="table", weight=1.5)
def image_to_table(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.mean((2, 3))",
        f"{x}.flatten(2).mean(-1)",
        f"F.adaptive_avg_pool2d({x}, 1).flatten(1)",
        f"{x}.amax((2, 3))",
        f"F.adaptive_avg_pool2d({x}, 1)[:, :, 0, 0]",
        f"torch.flatten({x}[:, :, :2, :2], 1)",
        f"{x}.sum((2, 3))",
    )


@block("image", gives="sequence")
def image_to_sequence(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.flatten(2)", f"{x}.mean(3)", f"{x}[..., 0]", f"{x}.unbind(2)[0]")


@block("sequence", gives="tokens")
def sequence_to_tokens(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.transpose(1, 2)", f"{x}.mT", f"{x}.permute(0, 2, 1)")


@block("sequence", gives="table")
def sequence_to_table(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.mean(2)", f"{x}[..., -1]", f"{x}.max(-1).values", f"{x}.max(-1)[0]", f"{x}.sum(-1)")


@block("sequence")
def move_sequence(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.flip(-1)", f"{x}.roll(1, -1)", f"torch.cat(({x}, {x}), 2)", f"{x}[:, :, 1:]", f"torch.stack(({x}, -{x}), 1).sum(1)"
    )


@block("volume", gives="table")
def volume_to_table(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.mean((2, 3, 4))", f"F.adaptive_avg_pool3d({x}, 1).flatten(1)")


@block("volume", gives="image")
def volume_to_image(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.flatten(2, 3)", f"{x}.mean(2)", f"{x}[:, :, 0]")


@block("volume", weight=0.7)
def move_volume(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.flip(2)", f"{x}.permute(0, 1, 4, 2, 3)", f"F.interpolate({x}, scale_factor=2)", f"F.pad({x}, (1, 1, 0, 0, 0, 1))"
    )


@block("image", weight=0.5)
def oddly_named(e: Emitter, x: Value) -> str:
    """Layers under names that Python or torch.fx use themselves."""
    name = e.pick(*_ODD_NAMES)
    layer = e.odd_module(name, f"nn.Sequential(nn.Conv2d({x.width}, {x.width}, 1), nn.BatchNorm2d({x.width}))")
    return f"{layer}({x})"


@block("image", weight=0.4)
def spectral_filter(e: Emitter, x: Value) -> str | None:
    """A filter in the frequency domain."""
    if e.dtype in ("float16", "bfloat16"):
        return None
    _, c, h, w = x.shape
    weight = e.parameter((c, h, w // 2 + 1, 2), scale=0.3)
    return f"torch.fft.irfft2(torch.fft.rfft2({x}, norm='ortho') * torch.view_as_complex({weight}), s=({h}, {w}), norm='ortho')"
