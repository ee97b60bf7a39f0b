"""Building blocks over tokens, tables and ids: products, attention, selections, embeddings."""

from __future__ import annotations

from tests.fuzz.emit import Emitter, Value, block

_ACTIVATIONS = ("F.gelu", "F.relu", "F.silu", "torch.tanh", "torch.sigmoid", "F.hardswish")


def _heads(width: int) -> int:
    return 2 if width % 2 == 0 else 1


@block("float", weight=5)
def linear(e: Emitter, x: Value) -> str | None:
    if x.kind not in ("tokens", "table"):
        return None
    layer = e.module(f"nn.Linear({x.width}, {e.new_width(x.width)}, bias={e.flag(0.7)})", "fc", x)
    return f"{layer}({x})"


@block("tokens", weight=2)
def same_linear(e: Emitter, x: Value) -> str:
    """As wide as what it reads, for residuals."""
    return f"{e.module(f'nn.Linear({x.width}, {x.width}, bias={e.flag(0.7)})', 'fc', x)}({x})"


@block("float")
def functional_linear(e: Emitter, x: Value) -> str | None:
    if x.kind not in ("tokens", "table"):
        return None
    d, n = x.width, e.new_width(x.width)
    w = e.parameter((n, d), scale=0.4)
    options = [
        f"F.linear({x}, {w})",
        f"F.linear({x}, {w}, {e.parameter((n,))})",
        f"{x} @ {w}.t()",
        f"torch.matmul({x}, {w}.T) + {e.parameter((n,))}",
        f"torch.einsum('...d,nd->...n', {x}, {w})",
        f"({w} @ {x}.mT).mT" if x.kind == "tokens" else f"({w} @ {x}.T).T",
    ]
    if x.kind == "table":
        options += [f"torch.addmm({e.parameter((n,))}, {x}, {w}.t())", f"F.linear({x}, {w}, {e.parameter((1, n))})"]
        options += [f"torch.addmm({e.parameter((n,))}, {x}, {w}.t(), beta=0.5, alpha=2)"]
    return e.pick(*options)


@block("table", gives="table", weight=0.7)
def bias_of_two_axes(e: Emitter, x: Value) -> str:
    """A bias for every row: the batch is that of the example."""
    n = e.new_width(x.width)
    return f"F.linear({x}, {e.parameter((n, x.width), scale=0.4)}, {e.parameter((x.shape[0], n))})"


@block("table", gives="table", weight=0.7)
def vector_products(e: Emitter, x: Value) -> str:
    """Matrix times vector: the vector's axis is the one that is summed over."""
    d = x.width
    a = e.parameter((d, d), scale=0.4)
    v = e.local(f"{x}[0]")
    return e.pick(
        f"({a} @ ({v} * {e.gain((d,))}))[None]",
        f"(torch.softmax({a}, -1) @ {v} * {e.gain((d,))})[None]",
        f"F.layer_norm({a} @ {v}, ({d},))[None]",
        f"torch.mv({a}, {v})[None]",
        f"({x} @ {e.parameter((d,))}).unsqueeze(1) + {x}",
        f"torch.outer({v}, {v}) @ {a}",
        f"torch.dot({v}, {e.parameter((d,))}) * {x}",
    )


@block("table", "table", gives="table", weight=0.7)
def bilinear(e: Emitter, x: Value, y: Value) -> str:
    return f"{e.module(f'nn.Bilinear({x.width}, {y.width}, {e.pick(4, 6)})', 'bi')}({x}, {y})"


@block("tokens", weight=2)
def mlp(e: Emitter, x: Value) -> str:
    d, h = x.width, x.width * 2
    if e.flag():
        act = e.pick("nn.GELU()", "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()", "nn.GELU('tanh')")
        return f"{e.module(f'nn.Sequential(nn.Linear({d}, {h}), {act}, nn.Dropout(0.1), nn.Linear({h}, {d}))', 'mlp', x)}({x})"
    up, down = e.module(f"nn.Linear({d}, {h}, bias={e.flag()})", "up"), e.module(f"nn.Linear({h}, {d}, bias={e.flag()})", "down")
    return f"{down}({e.pick(*_ACTIVATIONS)}({up}({x})))"


@block("tokens", weight=1.5)
def gated_mlp(e: Emitter, x: Value) -> str:
    d, h = x.width, x.width
    gate, up, down = (
        e.module(f"nn.Linear({a}, {b}, bias={e.flag(0.3)})", n) for n, a, b in (("gate", d, h), ("up", d, h), ("down", h, d))
    )
    if e.flag(0.4):
        both = e.module(f"nn.Linear({d}, {2 * h})", "both")
        return e.pick(f"{down}(F.glu({both}({x})))", f"{down}((lambda a, b: F.silu(a) * b)(*{both}({x}).chunk(2, -1)))")
    return f"{down}({e.pick(*_ACTIVATIONS)}({gate}({x})) * {up}({x}))"


@block("tokens", weight=2)
def attention(e: Emitter, x: Value) -> str:
    """Self-attention: fused or split projections, with and without norms of queries and keys, masks, rotary embedding."""
    d, heads = x.width, _heads(x.width)
    width, length = d // heads, x.shape[1]
    bias = e.flag()
    if e.flag():
        qkv = e.module(f"nn.Linear({d}, {3 * d}, bias={bias})", "qkv")
        t = e.local(f"{qkv}({x}).unflatten(-1, (3, {heads}, {width})).permute(2, 0, 3, 1, 4)")
        q, k, v = (e.local(f"{t}[{i}]") for i in range(3))
    else:
        q, k, v = (
            e.local(f"{e.module(f'nn.Linear({d}, {d}, bias={bias})', n)}({x}).unflatten(-1, ({heads}, -1)).transpose(1, 2)")
            for n in ("q", "k", "v")
        )
    if width > 1 and e.flag(0.3):
        norm = e.pick("nn.LayerNorm", "nn.RMSNorm")
        q, k = (e.local(f"{e.module(f'{norm}({width})', 'norm')}({t})") for t in (q, k))
    if width % 2 == 0 and e.flag(0.25):
        angle = e.buffer(f"torch.randn({length}, {width})", persistent=False)
        q, k = (
            e.local(f"{t} * {angle}.cos() + torch.cat((-{t}[..., {width // 2}:], {t}[..., :{width // 2}]), -1) * {angle}.sin()")
            for t in (q, k)
        )
    out = e.module(f"nn.Linear({d}, {d})", "out")
    mask = e.pick("none", "none", "causal", "float", "bool")
    if e.flag(0.6):
        given = {
            "none": "",
            "causal": ", is_causal=True",
            "float": f", attn_mask={e.parameter((length, length))}" if mask == "float" else "",
            "bool": f", attn_mask={e.buffer(f'torch.ones({length}, {length}, dtype=torch.bool).tril()')}" if mask == "bool" else "",
        }[mask]
        return f"{out}(F.scaled_dot_product_attention({q}, {k}, {v}{given}).transpose(1, 2).flatten(2))"
    scores = e.local(f"{q} @ {k}.transpose(-2, -1) * {width}**-0.5")
    if mask in ("causal", "bool"):
        keep = e.buffer(f"torch.ones({length}, {length}, dtype=torch.bool).tril()")
        scores = e.local(
            e.pick(
                f"{scores}.masked_fill(~{keep}, float('-inf'))", f"{scores}.masked_fill(~{keep}, torch.finfo({scores}.dtype).min)"
            )
        )
    if mask == "float":
        table, where = (
            e.parameter((heads, 7)),
            e.buffer(f"(torch.arange({length})[:, None] - torch.arange({length})).clamp(-3, 3) + 3"),
        )
        scores = e.local(f"{scores} + {table}[:, {where}]")
    return f"{out}((torch.softmax({scores}, -1) @ {v}).transpose(1, 2).reshape({x}.shape[0], -1, {d}))"


@block("tokens", weight=0.7)
def multihead_attention(e: Emitter, x: Value) -> str:
    layer = e.module(f"nn.MultiheadAttention({x.width}, {_heads(x.width)}, batch_first=True, bias={e.flag()})", "attn")
    return f"{layer}({x}, {x}, {x}, need_weights={e.flag(0.3)})[0]"


@block("tokens", weight=0.3)
def encoder_layer(e: Emitter, x: Value) -> str:
    layer = e.module(
        f"nn.TransformerEncoderLayer({x.width}, {_heads(x.width)}, 8, batch_first=True, norm_first={e.flag()}, dropout=0.1)",
        "block",
    )
    return f"{layer}({x})"


@block("tokens", "same")
def cross_attention(e: Emitter, x: Value, memory: Value) -> str:
    d = x.width
    q, k, v = (
        e.module(f"nn.Linear({a}, {d}, bias={e.flag()})", n) for n, a in (("q", d), ("k", memory.width), ("v", memory.width))
    )
    return f"F.scaled_dot_product_attention({q}({x}), {k}({memory}), {v}({memory}))"


@block("tokens", weight=0.3)
def recurrent(e: Emitter, x: Value) -> str:
    kind = e.pick("nn.GRU", "nn.LSTM")
    return f"{e.module(f'{kind}({x.width}, {e.pick(4, 6)}, batch_first=True)', 'rnn')}({x})[0]"


@block("tokens")
def token_mixing(e: Emitter, x: Value) -> str:
    t = x.shape[1]
    return e.pick(
        f"{e.module(f'nn.Linear({t}, {t})', 'mix')}({x}.transpose(1, 2)).transpose(1, 2)",
        f"torch.einsum('st,btc->bsc', {e.parameter((t, t), scale=0.4)}, {x})",
        f"{e.module(f'nn.Conv1d({t}, {t}, 1)', 'mix')}({x})",
        f"torch.softmax({e.parameter((t, t))}, -1) @ {x}",
        f"{e.module(f'nn.Conv1d({x.width}, {x.width}, 3, padding=1, groups={x.width})', 'mix')}({x}.mT).mT",
        f"{e.parameter((t, t), scale=0.4)} @ {x}",
    )


@block("tokens", weight=1.5)
def select_tokens(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}[:, 1:]",
        f"{x}[:, :1]",
        f"{x}[:, ::2]",
        f"{x}.flip(1)",
        f"{x}.roll(1, 1)",
        f"torch.roll({x}, -1, dims=1)",
        f"{x}[:, {e.buffer(f'torch.randperm({x.shape[1]})')}]",
        f"torch.cat([{x}[:, :1], {x}], 1)",
        f"{x}.index_select(1, {e.buffer('torch.tensor([1, 0])')})",
        f"torch.cat({x}.split(1, 1), -1)" if x.shape[1] < 4 else f"{x}[:, -2:]",
    )


@block("tokens", weight=1.5)
def move_features(e: Emitter, x: Value) -> str | None:
    d = x.width
    options = [f"{x}.flip(-1)", f"{x}.roll(1, -1)", f"{x}[..., {e.buffer(f'torch.randperm({d})')}]"]
    options.append(f"{x}.gather(-1, {e.buffer(f'torch.randperm({d})')}.expand({x}.shape))")
    if d % 2 == 0:
        options += [
            f"torch.cat({x}.chunk(2, -1)[::-1], -1)",
            f"{x}.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)",
            f"torch.stack({x}.split({d // 2}, -1), -1).flatten(-2)",
            f"{x}.view({x}.shape[0], -1, 2, {d // 2}).sum(2)",
            f"{x}[..., ::2] * {x}[..., 1::2]",
            f"torch.cat(({x}[..., :{d // 2}] * 2, {x}[..., {d // 2}:]), dim=-1)",
            f"{x}.reshape({x}.shape[0], -1, {d // 2})",
        ]
    return e.pick(*options)


@block("tokens")
def extra_token(e: Emitter, x: Value) -> str:
    token = e.parameter((1, 1, x.width))
    return e.pick(
        f"torch.cat([{token}.expand({x}.shape[0], -1, -1), {x}], 1)", f"torch.cat(({x}, {token}.repeat({x}.shape[0], 1, 1)), dim=1)"
    )


@block("tokens")
def positions(e: Emitter, x: Value) -> str:
    t, d = x.shape[1:]
    return e.pick(
        f"{x} + {e.parameter((1, t, d))}",
        f"{x} + {e.parameter((t, d))}[:{x}.shape[1]]",
        f"{x} + {e.module(f'nn.Embedding(32, {d})', 'pos')}(torch.arange({x}.shape[1]))",
        f"{x} + {e.buffer(f'torch.randn(1, {t}, {d})')}",
        f"{x} + {e.module(f'nn.Embedding(32, {d})', 'pos')}.weight[:{x}.shape[1]]",
        f"{x} + torch.sin(torch.arange({x}.shape[1], dtype={x}.dtype)[:, None] * {e.buffer(f'torch.rand({d})')})",
    )


@block("tokens", gives="table", weight=2)
def tokens_to_table(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}[:, 0]",
        f"{x}.mean(1)",
        f"{x}[:, -1]",
        f"{x}.max(1).values",
        f"{x}.amax(1)",
        f"{x}.flatten(1)",
        f"{x}.sum(1)",
        f"{x}.select(1, 0)",
        f"{x}.unbind(1)[1]",
        f"{x}[:, 1:].mean(dim=1)",
        f"(torch.softmax({x} @ {e.parameter((x.width,))}, 1)[..., None] * {x}).sum(1)",
    )


@block("tokens", gives="image")
def tokens_to_image(e: Emitter, x: Value) -> str | None:
    side = round(x.shape[1] ** 0.5)
    if side * side != x.shape[1]:
        return None
    return e.pick(
        f"{x}.transpose(1, 2).unflatten(2, ({side}, {side}))", f"{x}.view(-1, {side}, {side}, {x.width}).permute(0, 3, 1, 2)"
    )


@block("tokens", gives="sequence")
def tokens_to_sequence(e: Emitter, x: Value) -> str:
    return e.pick(f"{x}.transpose(1, 2)", f"{x}.mT.contiguous()", f"{x}.transpose(-2, -1)")


@block("table", gives="tokens")
def table_to_tokens(e: Emitter, x: Value) -> str:
    d = x.width
    return e.pick(
        f"{x}.unsqueeze(1)",
        f"{x}[:, None].expand(-1, 3, -1)",
        f"torch.stack([{x}, {x} * 2], 1)",
        f"{x}[:, None] + {e.parameter((3, d))}",
    )


@block("tokens", "same", weight=1.5)
def concat_features(e: Emitter, x: Value, y: Value) -> str:
    return e.pick(f"torch.cat([{x}, {y}], -1)", f"torch.cat([{x}, {y}], 1)", f"torch.cat([{x}, {y}], 2)[..., :{x.width}]")


@block("tokens", "same", weight=0.7)
def products(e: Emitter, x: Value, y: Value) -> str:
    return e.pick(
        f"{x} @ {y}.transpose(1, 2) @ {x}",
        f"torch.bmm({x}, {x}.mT) @ {x}",
        f"torch.einsum('btc,bsc->bts', {x}, {y})",
        f"{x} @ ({x}.mT @ {y})",
    )


@block("ids", gives="tokens", weight=4)
def embedding(e: Emitter, x: Value) -> str:
    d = e.pick(4, 6, 8)
    padding = e.pick("", "", ", padding_idx=0")
    return f"{e.module(f'nn.Embedding(16, {d}{padding})', 'emb')}({x})"


@block("ids", gives="tokens")
def functional_embedding(e: Emitter, x: Value) -> str:
    table = e.parameter((16, 6))
    return e.pick(f"F.embedding({x}, {table})", f"{table}[{x}]", f"F.one_hot({x}, 16).to({table}.dtype) @ {table}")


@block("ids", gives="table", weight=0.5)
def embedding_bag(e: Emitter, x: Value) -> str:
    mode = e.pick("mean", "sum", "max")
    return f"{e.module(f'nn.EmbeddingBag(16, 6, mode={mode!r})', 'bag')}({x})"


@block("ids", gives="tokens")
def integer_features(e: Emitter, x: Value) -> str:
    """Integers as numbers: pixels, time steps, counts."""
    layer = e.module(f"nn.Linear(1, {e.pick(4, 6)})", "fc")
    dtype = f"torch.{e.dtype}"
    return e.pick(
        f"{layer}({x}.to({dtype})[..., None])",
        f"{layer}(({x} / 15).to({dtype}).unsqueeze(-1))",
        f"{layer}((({x} - 3) * 0.1).to({dtype}).unsqueeze(-1))",
        f"{layer}({x}.to({dtype}).div(15).unsqueeze(-1))",
        f"{layer}(({x} % 5 // 2).to({dtype})[..., None])",
    )


@block("ids", gives="ids", weight=0.5)
def change_ids(e: Emitter, x: Value) -> str:
    return e.pick(
        f"{x}.flip(1)",
        f"({x} + 1) % 16",
        f"torch.where({x} > 3, {x}, 0)",
        f"{x}.clamp(1, 12)",
        f"{x}[:, 1:]",
        f"{x}.roll(1, 1)",
        f"{x} ^ 1",
    )


@block("ids", "tokens", gives="tokens", weight=0.7)
def mask_tokens(e: Emitter, ids: Value, x: Value) -> str:
    return e.pick(
        f"{x} * ({ids} > 4).unsqueeze(-1)",
        f"{x}.masked_fill(({ids} == 0)[..., None], 0.0)",
        f"{x} + ({ids} > 4).to({x}.dtype)[..., None]",
        f"torch.where(({ids} > 4)[..., None], {x}, {e.parameter((x.width,))})",
    )


@block("float", weight=0.7)
def tied_weights(e: Emitter, x: Value) -> str | None:
    """The weight of an earlier layer once more."""
    layers = [m for m, kind, width in e.made if kind == x.kind and width == x.width and ("fc" in m or "emb" in m)]
    if x.kind not in ("tokens", "table") or not layers:
        return None
    layer = e.pick(*layers)
    return e.pick(f"F.linear({x}, {layer}.weight)", f"{x} @ {layer}.weight.t()")


@block("float", weight=1.5)
def called_again(e: Emitter, x: Value) -> str | None:
    """A module that an earlier step has called."""
    found = [m for m, kind, width in e.made if kind == x.kind and width == x.width]
    return f"{e.pick(*found)}({x})" if found else None
