"""Where affines land, and the exact reasons why they do not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import normfuse
from tests.zoo import randomise_norms


def report_of(model, *example, **options):
    model = randomise_norms(model).eval()
    fast = normfuse.optimize(model, example, **options)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    return report


def refusals(report, path):
    return " / ".join(site.note for site in report.refused if site.path == path)


@given(
    nd=st.sampled_from([1, 2, 3]), groups=st.sampled_from([1, 2, 4]), kernel=st.integers(1, 3), padding=st.integers(0, 2),
    stride=st.integers(1, 2), transposed=st.booleans(), bias=st.booleans(), before=st.booleans(),
)  # fmt: skip
def test_batch_norm_beside_any_convolution_folds_or_is_refused_exactly(
    nd, groups, kernel, padding, stride, transposed, bias, before
):
    convolution = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[nd][
        transposed
    ]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[nd](4)
    conv = convolution(4, 4, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
    x = torch.randn(2, 4, *[5] * nd)
    if conv(x).numel() == 0:
        return
    # a gelu in front, so that the norm cannot be taken for one on a graph input
    report = report_of(nn.Sequential(nn.GELU(), norm, conv) if before else nn.Sequential(conv, norm), x)
    blocked = before and (transposed or padding > 0)
    assert report.norms_after["batch_norm"] == int(blocked)
    if blocked:
        reason = "overlapping kernels" if transposed else "a shift does not commute with zero padding"
        assert reason in refusals(report, "1")


class Tokens(nn.Module):
    """A BatchNorm over features, read through what attention code does to tokens."""

    def __init__(self, how):
        super().__init__()
        self.norm, self.head, self.how = nn.BatchNorm1d(8), nn.Linear(8, 3), how
        self.wide, self.flat = nn.Linear(16, 3), nn.Linear(32, 3)

    def forward(self, x):
        y = self.norm(F.gelu(x).transpose(1, 2)).transpose(1, 2)
        match self.how:
            case "select":
                return self.head(y[:, 0])
            case "mean":
                return self.head(y.mean(1))
            case "roll and windows":
                z = torch.roll(y.reshape(2, 2, 2, 8), (1, 1), (1, 2)).reshape(2, 2, 1, 2, 1, 8).permute(0, 1, 3, 2, 4, 5)
                return self.head(z.reshape(-1, 1, 8))
            case "cat of features":
                return self.wide(torch.cat([y[:, ::2], y[:, 1::2]], -1))
            case "cat of tokens":
                return self.head(torch.cat([y, y[:, :1]], 1))
            case "chunks":
                a, b = y.chunk(2, -1)
                return F.linear(a, self.head.weight[:, :4]) + F.linear(b, self.head.weight[:, 4:])
            case "flatten":
                return self.flat(y.flatten(1))
            case "attention values":
                return self.head(F.scaled_dot_product_attention(x, x, y))
        raise AssertionError


@pytest.mark.parametrize(
    "how", ["select", "mean", "roll and windows", "cat of features", "cat of tokens", "chunks", "flatten", "attention values"]
)
def test_affines_move_through_what_moves_data(how):
    assert report_of(Tokens(how), torch.randn(2, 4, 8)).norms_after["batch_norm"] == 0


class Branches(nn.Module):
    def __init__(self, blocked):
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.blocked = blocked

    def forward(self, x):
        y = self.norm(F.gelu(x))
        return self.a(y).mean() + self.b(y).mean() + (y.sigmoid().mean() if self.blocked else 0)


def test_all_readers_take_it_or_none():
    x = torch.randn(2, 4, 8, 8)
    assert report_of(Branches(False), x).norms_after["batch_norm"] == 0
    report = report_of(Branches(True), x)
    assert report.norms_after["batch_norm"] == 1
    assert "sigmoid does not take an affine" in refusals(report, "norm")


def test_a_refusal_names_what_blocks_and_what_would_help():
    report = report_of(nn.Sequential(nn.GELU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), torch.randn(2, 4, 8, 8))
    site = next(s for s in report.refused if s.path == "1")
    assert site.blocker == "2"
    assert "padding=0" in site.remedy


def test_a_large_shared_weight_is_not_stored_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.big = nn.LayerNorm(160), nn.Linear(160, 160)

        def forward(self, x):
            return self.big(F.relu(self.big(self.norm(x))))

    report = report_of(Shared(), torch.randn(2, 160))
    assert "is shared with big; folding would store its" in refusals(report, "norm")
    assert report.bytes_after <= report.bytes_before * 1.01


def test_layer_scale_goes_into_the_writer():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x):
            return x + self.gamma * self.fc(x)

    report = report_of(Branch(), torch.randn(3, 8))
    assert [s.rule for s in report.applied] == ["affine_into_producer"]
    assert report.parameters_after == report.parameters_before - 8


def test_the_scale_of_queries_goes_into_one_third_of_the_weights():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            return (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v

    fast = normfuse.optimize(Queries().eval(), (torch.randn(2, 5, 8),))
    assert "mul" not in " ".join(str(n.target) for n in fast.graph.nodes if "matmul" not in str(n.target))
    assert normfuse.report(fast).exact.max_rel <= 1e-9


@pytest.mark.parametrize("shift", [False, True])
def test_a_norm_on_a_graph_input_leaves_at_most_one_addition(shift):
    torch.manual_seed(1)
    model = randomise_norms(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1 if shift else 0))).eval()
    fast = normfuse.optimize(model, (torch.randn(1, 3, 8, 8),))
    kinds = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
    assert kinds == (["aten.add.Tensor"] if shift else []) + ["aten.conv2d.default"]


def test_division_by_zero_is_left_alone():
    class Division(nn.Module):
        def forward(self, x):
            return x / 0.0

    fast = normfuse.optimize(Division(), (torch.randn(3),))
    x = torch.tensor([1.0, -1.0, 2.0])
    assert torch.equal(fast(x), x / 0.0)
