"""`normfuse.save` and `normfuse.load`, and what a module keeps of its report and its gradients."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse
from normfuse.app.random_norms import randomise_norms
from normfuse.errors import ExportError, UsageError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64), nn.LayerNorm(64)
    return randomise_norms(nn.Sequential(*layers, nn.Linear(64, 4)), seed=0).eval()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="fixed"),
        pytest.param({"dynamic_shapes": ({0: Dim("batch", min=2, max=64)},)}, id="any-batch"),
        pytest.param({"quantize": normfuse.ShiftQuant(weight_bits=4, activation_bits=8)}, id="quantized"),
    ],
)
def test_a_module_comes_back_with_its_report_and_its_conditions(options, tmp_path):
    fast = normfuse.optimize(network(), (X,), **options)
    normfuse.save(fast, tmp_path / "model.pt2")
    back = normfuse.load(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(back(X), fast(X))
    assert normfuse.report(back) == normfuse.report(fast)
    assert list(back.state_dict()) == list(fast.state_dict())
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {n: p.requires_grad for n, p in fast.named_parameters()}
    with pytest.raises(UsageError, match="dynamic_shapes"):
        back(torch.randn(2, 3, 9, 9))
    if "dynamic_shapes" in options:
        assert back(torch.randn(5, 3, 8, 8)).shape == (5, 4)
    normfuse.save(back, tmp_path / "again.pt2")  # it is what `optimize` returned


def test_files_are_not_replaced_unasked(tmp_path):
    fast = normfuse.optimize(network(), (X,))
    normfuse.save(fast, tmp_path / "model.pt2")
    with pytest.raises(UsageError, match="exists already; pass force=True"):
        normfuse.save(fast, tmp_path / "model.pt2")
    normfuse.save(fast, tmp_path / "model.pt2", force=True)
    with pytest.raises(UsageError, match="does not exist"):
        normfuse.load(tmp_path / "another.pt2")
    with pytest.raises(UsageError, match="is no file, but a folder"):
        normfuse.load(tmp_path)
    for call in (normfuse.load, lambda path: normfuse.save(fast, path)):
        with pytest.raises(UsageError, match="expected the path of a file, got NoneType"):
            call(None)


def test_what_cannot_be_saved_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"has the classes of the original model.*state_dict"):
        normfuse.save(normfuse.fold(network(), (X,)), tmp_path / "model.pt2")
    with pytest.raises(UsageError, match=r"is not what normfuse.optimize returned"):
        normfuse.save(network(), tmp_path / "model.pt2")
    with pytest.raises(ExportError, match="pass example inputs to optimize"):
        normfuse.save(normfuse.optimize(network()), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_graphs_that_somebody_hooked_are_not_taken_without_the_hook(tmp_path):
    fast = normfuse.optimize(network(), (X,))
    hook = fast.register_forward_hook(lambda module, args, out: out * 2)
    for call in (
        lambda: normfuse.save(fast, tmp_path / "model.pt2"),
        lambda: normfuse.optimize(fast, (X,)),
        lambda: normfuse.optimize(fast),
        lambda: normfuse.fold(fast, (X,)),
    ):
        with pytest.raises(UsageError, match="graph with forward hooks, which are lost"):
            call()
    around = torch.nn.Sequential(fast)  # what the message says
    hook.remove()
    around.register_forward_hook(lambda module, args, out: out * 2)
    torch.testing.assert_close(normfuse.optimize(around, (X,))(X), 2 * fast(X))


def test_a_program_of_somebody_else_comes_without_a_report(tmp_path):
    torch.export.save(torch.export.export(network(), (X,)), tmp_path / "model.pt2")
    assert not normfuse.report(normfuse.load(tmp_path / "model.pt2")).applied


def test_pickle_and_copies_keep_the_report():
    fast = normfuse.optimize(network(), (X,))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(fast)):
        assert normfuse.report(other) == normfuse.report(fast)


def test_gradients_are_asked_for_as_before():
    model = network()
    model[4].requires_grad_(False)
    fast = normfuse.optimize(model, (X,))
    asked = {name: p.requires_grad for name, p in fast.named_parameters()}
    assert asked == {"0.weight": True, "0.bias": True, "4.weight": False, "4.bias": False, "6.weight": True, "6.bias": True}
    frozen = normfuse.optimize(network().requires_grad_(False), (X,))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_folded_weight_is_trained_if_one_of_its_sources_was():
    model = network().requires_grad_(False)
    model[1].requires_grad_(True)
    asked = {name for name, p in normfuse.optimize(model, (X,)).named_parameters() if p.requires_grad}
    assert asked == {"0.weight", "0.bias"}


def test_what_no_gradient_reaches_is_not_trained():
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))

        def forward(self, x):
            none, one = torch.zeros_like(self.weight), torch.ones_like(self.weight)
            return nn.functional.batch_norm(x, none, one, self.weight, none).relu()

    fast = normfuse.optimize(Zeros(), (X,))
    fast(X).sum().backward()  # batch_norm takes no statistics that ask for gradients
    assert fast.weight.grad is not None


def test_integers_are_never_trained():
    fast = normfuse.optimize(network(), (X,), quantize=normfuse.ShiftQuant(weight_bits=8, activation_bits=8))
    assert all(p.is_floating_point() for p in fast.parameters() if p.requires_grad)


def test_the_result_can_be_fine_tuned():
    fast = normfuse.optimize(network(), (X,)).train()
    step = torch.optim.SGD(fast.parameters(), 0.01)
    losses = []
    for _ in range(3):
        loss = (fast(X) - 1).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
