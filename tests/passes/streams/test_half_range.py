"""Streams beyond the range of float16: scaled exactly, in every reader and writer; refused where something reads them raw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse.errors import ExportError
from normfuse.export import Exported, to_onnx
from normfuse.export.onnx.runtime import run, session
from normfuse.reports.model import Site

pytest.importorskip("onnxruntime")

D = 32


class Block(nn.Module):
    """Pre-norm; with `post` a norm writes the stream as well, as in Gemma 3."""

    def __init__(self, norm: Callable[[int], nn.Module], *, post: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(D), norm(D)
        self.post1, self.post2 = (norm(D), norm(D)) if post else (nn.Identity(), nn.Identity())
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=not post) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, n, 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, D)
        x = x + self.post1(self.o(y))
        y = self.norm2(x)
        return x + self.post2(self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y)))


class Gemma(nn.Module):
    """Scaled embeddings that the head is tied to, RMSNorms in front of and behind every branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, D), nn.RMSNorm(D, eps=1e-6)
        self.blocks = nn.ModuleList(Block(lambda d: nn.RMSNorm(d, eps=1e-6), post=True) for _ in range(3))
        self.head = nn.Linear(D, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * D**0.5
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Siglip(nn.Module):
    """Patches and positions, LayerNorms, the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, D, 4, 4), nn.LayerNorm(D, eps=1e-6)
        self.position = nn.Parameter(torch.randn(1, 9, D))
        self.blocks = nn.ModuleList(Block(lambda d: nn.LayerNorm(d, eps=1e-6), post=False) for _ in range(3))
        self.head = nn.Linear(D, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def _grown(model: nn.Module, by: float = 2e5) -> nn.Module:
    """What writes the stream is large, as it is in the checkpoints that people complain about."""
    for name, m in model.named_modules():
        if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
            for p in m.parameters():
                nn.init.normal_(p, 1, 0.3)
        if name.endswith("post2") or (name.endswith("down") and not isinstance(model, Gemma)):
            for p in m.parameters():
                p.data.mul_(by)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "gemma": (Gemma, lambda: torch.randint(0, 40, (2, 6))),
    "siglip": (Siglip, lambda: torch.randn(2, 3, 12, 12)),
}


def _made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    return _grown(make()), x()


def _sites(fast: nn.Module) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    (found,) = (p for p in normfuse.report(fast).passes if p.name == "half_range")
    return found.applied, found.refused


@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_the_same_bit_for_bit_and_fits(name: str) -> None:
    """Powers of two round nothing: even in float32 no bit differs from the pipeline without the pass."""
    model, x = _made(name)
    plain = normfuse.optimize(model, (x,), verify="off")
    fast = normfuse.optimize(model, (x,), passes=["default", "half_range"])
    (site,), refused = _sites(fast)
    assert not refused
    assert "in ε of 7 norms" in site.note
    assert not normfuse.report(fast).undone
    torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=0)
    largest = max(v.abs().max() for v in _values(fast, x))
    assert max(v.abs().max() for v in _values(plain, x)) > 65504
    assert largest < 65504 / 8


def _values(fast: Any, *inputs: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor) and out.is_floating_point() and n.op == "call_function":
                found.append(out.detach())
            return out

    Watched(fast).run(*inputs)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_half_is_right_where_it_was_nan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _made(name)
    fast = normfuse.optimize(model, (x,), verify="off")
    file = _half(fast, tmp_path)
    assert file.error is not None
    assert file.error.max_rel < 1e-2
    assert any("2^-" in note for note in file.notes)
    (got,) = run(session(file.path, threads=1), {file.inputs[0]: x}).values()
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(got.float(), want, rtol=0, atol=2e-2 * float(want.abs().max()))
    monkeypatch.setattr("normfuse.export.onnx.api._computes_in_half", lambda *_: False)
    with pytest.raises(ExportError, match="NaN or infinite"):
        _half(fast, tmp_path)


def _half(model: nn.Module, folder: Path) -> Exported:
    return to_onnx(model, folder / "m.onnx", dtype="fp16", threads=1, force=True, progress=False)


def test_a_model_in_half_itself(tmp_path: Path) -> None:
    """Its own arithmetic gives NaN; the scaled one what float32 gives."""
    model, x = _made("siglip")
    with torch.no_grad():
        want, half, x = model(x), model.half(), x.half()
        assert not half(x).isfinite().all()
    fast = normfuse.optimize(half, (x,), passes=["default", "half_range"], verify="off")
    assert len(_sites(fast)[0]) == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x).float(), want, rtol=0, atol=2e-2 * float(want.abs().max()))
    proven = normfuse.optimize(half, (x,), passes=["default", "half_range"])
    assert len(_sites(proven)[0]) == 1
    assert not normfuse.report(proven).undone
    assert any("NaN or Inf" in note for note in normfuse.report(proven).notes)


class Around(nn.Module):
    """A stream of large numbers, and `read` behind it."""

    def __init__(self, read: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.read = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D), read
        self.batch, self.group, self.conv = nn.BatchNorm1d(D), nn.GroupNorm(4, D), nn.Conv1d(D, D, 3, padding=1)
        self.table, self.gain = nn.Parameter(torch.randn(5, D)), nn.Parameter(torch.rand(D) * 1e-4)
        for p in (*self.a.parameters(), *self.b.parameters()):
            p.data.mul_(2e5)
        nn.init.uniform_(self.batch.running_var, 1, 2)
        nn.init.normal_(self.batch.running_mean)

    def forward(self, x: Tensor) -> Any:
        return self.read(self, self.a(x))


X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))

PASSED_ON: dict[str, Callable[..., Any]] = {
    "linear": lambda m, s: F.linear(s, m.b.weight * 1e-9).tanh(),
    "conv": lambda m, s: m.norm(m.conv(s.transpose(1, 2)).transpose(1, 2)),
    "batch norm": lambda m, s: m.batch(s.transpose(1, 2)) * 1e-6,
    "group norm": lambda m, s: m.group(s.transpose(1, 2)),
    "sum and table": lambda m, s: m.norm(s + m.b(s.relu() * 1e-6) - m.table),
    "layer scale": lambda m, s: s * m.gain,
    "number": lambda m, s: (s / 1e5).tanh(),
    "gate": lambda m, s: m.norm(s * torch.sigmoid(m.table)),
    "heads": lambda m, s: m.norm(torch.cat([s.chunk(2, -1)[1], s[..., : D // 2]], -1).flip(1)),
    "pool": lambda m, s: m.norm(F.max_pool1d(s.transpose(1, 2), 2).mean(-1)),
}


@pytest.mark.parametrize("read", PASSED_ON)
def test_what_passes_a_scale_on(read: str) -> None:
    torch.manual_seed(0)
    model = Around(PASSED_ON[read]).eval()
    plain = normfuse.optimize(model, (X,), passes=["cleanup"], verify="off")
    fast = normfuse.optimize(model, (X,), passes=["cleanup", "half_range"])
    applied, refused = _sites(fast)
    assert applied
    assert not refused
    assert not normfuse.report(fast).undone
    torch.testing.assert_close(fast(X), plain(X), rtol=1e-6, atol=1e-6)
    assert max(v.abs().max() for v in _values(fast, X)) < 65504 / 4


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "output": (lambda m, s: (s, m.norm(s)), "gives it out"),
    "tanh": (lambda m, s: s.tanh() + m.norm(s), "does not commute"),
    "square": (lambda m, s: m.norm(s * s), "by itself"),
    "quotient": (lambda m, s: m.norm(s / (s + m.table)), "by itself"),
}


@pytest.mark.parametrize("read", REFUSED)
def test_what_does_not(read: str) -> None:
    call, words = REFUSED[read]
    model = Around(call).eval()
    fast = normfuse.optimize(model, (X,), passes=["cleanup", "half_range"])
    refused = _sites(fast)[1]
    assert any(words in site.note for site in refused)
    torch.testing.assert_close(fast(X), model(X))


def test_the_reason_stands_in_the_error(tmp_path: Path) -> None:
    model = Around(lambda m, s: s.tanh() + m.norm(s)).eval()
    fast = normfuse.optimize(model, (X,), passes=["cleanup"], verify="off")
    notes = _half(fast, tmp_path).notes  # the norm of this one is computed in float32
    assert any("does not commute with a scale" in note for note in notes)
    with torch.no_grad():
        model.a.weight.mul_(1e3)
    again = normfuse.optimize(model, (X,), passes=["cleanup"], verify="off")
    with pytest.raises(ExportError, match="does not commute with a scale"):
        _half(again, tmp_path)


def test_without_samples_or_need_nothing_happens() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)).eval()
    fast = normfuse.optimize(model, (X,), passes=["half_range"])
    assert _sites(fast) == ((), ())
