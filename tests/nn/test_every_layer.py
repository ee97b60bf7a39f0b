"""Every layer in every situation: it behaves, or it refuses with a message that says why."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.errors import UsageError
from tests.nn.layers import LAYERS
from tests.tolerances import IDENTITY, TOLERANCES

each = pytest.mark.parametrize("name", LAYERS)
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def close(found, expected, dtype):
    rtol, found, expected = TOLERANCES[dtype].rtol, found.detach(), expected.detach()
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.double().abs().max()))


@modes
@each
def test_float32_agrees_with_float64(name, training):
    case = LAYERS[name]
    narrow, wide = case.build().train(training), case.build(torch.float64).train(training)
    for seed in range(3):  # statistics of several steps
        close(narrow(case.input(seed=seed)), wide(case.input(torch.float64, seed=seed)), torch.float32)
    for key, value in wide.state_dict().items():
        close(narrow.state_dict()[key], value, torch.float32)


@modes
@each
def test_layout_in_memory_does_not_matter(name, training):
    case = LAYERS[name]
    x = case.input()
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    close(case.build().train(training)(strided), case.build().train(training)(x), torch.float32)


@modes
@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_inputs_keep_statistics_in_float32(name, training, dtype):
    """Values of 500, whose squares float16 cannot hold: the output is finite and close to that of float32."""
    case = LAYERS[name]
    x = (
        (case.input() * 200).to(dtype)
        if "Conv" not in name and "Linear" not in name and name != "WeightCompander"
        else case.input(dtype=dtype)
    )
    with torch.no_grad():
        found = case.build(dtype).train(training)(x)
        expected = case.build(dtype).float().train(training)(x.float())
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    close(found, expected, dtype)


@modes
@each
def test_autocast(name, training):
    case = LAYERS[name]
    layer = case.build().train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(case.input().requires_grad_())
        out.float().square().mean().backward()
    with torch.no_grad():
        close(out, case.build().train(training)(case.input()), torch.bfloat16)
    statistics = {k: v for k, v in layer.state_dict().items() if "running" in k}
    assert all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in statistics.values())


@modes
@each
def test_one_sample(name, training):
    case = LAYERS[name]
    out = case.build().train(training)(case.input().narrow(case.batch_axis, 0, 1))
    assert bool(out.isfinite().all())


@modes
@each
def test_empty_batch(name, training):
    case = LAYERS[name]
    x = case.input().narrow(case.batch_axis, 0, 0)
    layer = case.build().train(training)
    before = copy.deepcopy(layer.state_dict())
    if training and case.train_needs == "refuse":
        with pytest.raises(UsageError, match=r"empty|no rows|no values|at least one"):
            layer(x)
    else:
        assert layer(x).numel() == 0
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items() if "num_batches" not in k and k != "iters")


@each
def test_state_dict_round_trip(name):
    case = LAYERS[name]
    layer = case.build()
    fresh = case.make()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    close(fresh.eval()(case.input()), layer.eval()(case.input()), torch.float32)


@modes
@each
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_activation_checkpointing_changes_nothing(name, training, reentrant):
    case = LAYERS[name]
    plain, saving = case.build(torch.float64).train(training), case.build(torch.float64).train(training)
    for seed in range(3):
        a = case.input(torch.float64, seed).requires_grad_()
        b = case.input(torch.float64, seed).requires_grad_()
        y, z = plain(a), checkpoint(saving, b, use_reentrant=reentrant)
        torch.testing.assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for (key, p), q in zip(plain.state_dict(keep_vars=True).items(), saving.state_dict(keep_vars=True).values(), strict=True):
        torch.testing.assert_close(p, q, msg=key)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at the output of a layer it cannot trace
@modes
@each
def test_compile(name, training):
    case = LAYERS[name]
    torch._dynamo.reset()
    eager = case.build().train(training)
    compiled = torch.compile(case.build().train(training), backend="aot_eager")
    for seed in range(2):
        a, b = case.input(seed=seed).requires_grad_(), case.input(seed=seed).requires_grad_()
        y, z = eager(a), compiled(b)
        close(z, y, torch.float32)
        y.square().mean().backward()
        z.square().mean().backward()
        close(b.grad, a.grad, torch.float32)


@each
def test_export(name):
    case = LAYERS[name]
    layer, x = case.build().eval(), case.input()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(layer, (x,), strict=False)
    close(program.module()(x), layer(x), torch.float32)


@each
def test_optimize_is_exact_with_and_without_inputs(name):
    case = LAYERS[name]
    layer, x = case.build().eval(), case.input()
    report = normfuse.report(fast := normfuse.optimize(layer, (x,)))
    assert report.exact.max_rel <= IDENTITY
    assert not report.undone
    close(fast(x), layer(x), torch.float32)
    close(normfuse.optimize(layer)(x), layer(x), torch.float32)


@each
def test_the_docstring_gives_a_source(name):
    case = LAYERS[name]
    layer = case.make()
    documented = [type(m) for m in layer.modules() if type(m).__module__.startswith("normfuse.nn")]
    assert documented
    assert all("Source:" in (kind.__doc__ or "") for kind in documented[:1])
