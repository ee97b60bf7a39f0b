"""Pre-LayerNorm → Pre-RMSNorm → Pre-CRMSNorm on the trained transformers: exact for inference, and for training too.

    LN(x; γ, β) W + b = RMS(Π x) W' + b',   W' = W diag(γ),   b' = b + W β,   Π = 1 − mean over the features

Every writer of the stream is followed by Π, so that the stream is mean-free; CRMSNorm then does without one of its features.
Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, NeurIPS 2023, section 3.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import normfuse
from benchmarks.training.data import Images, Text
from benchmarks.training.tasks import Task
from benchmarks.training.train import held_out
from normfuse.nn.convert import convert
from normfuse.passes.streams.compress import Compress

__all__ = ["compressed", "without_one_feature"]

_TO_RMS = ("cleanup", "expose", "affine", "mean_free", "affine", "realise")
_READERS = {"attention.qkv": "norm1", "fc1": "norm2", "head": "norm"}
_WRITERS = ("patch", "proj", "fc2")  # the axis of the features comes first; it comes last in tables and tokens
_TABLES = ("cls", "pos", "token.weight", "position.weight")


def compressed(task: Task, model: nn.Module, data: Images | Text) -> dict[str, Any]:
    """Convert `model`, which has LayerNorms, for inference by the passes `mean_free` and `compress`, and for training.

    For training, RMSNorm comes from `normfuse.nn.convert`; CRMSNorm from `without_one_feature`, through which the gradients
    flow back to the parameters of `model`.

    Returns:
        rms_exact, crms_exact: float64 error of the optimized model, relative to the largest output.
        rms_layer_norms, crms_layer_norms: LayerNorms that are left.
        crms_sites: norms that `compress` has rewritten.
        rms_gradient, crms_gradient: error of the gradients of all parameters in float64, relative to the largest.
    """
    x, y = (v[:16] for v in held_out(data, task.recipe))
    found: dict[str, Any] = {}
    for name, passes in (("rms", _TO_RMS), ("crms", (*_TO_RMS, Compress(), "cleanup"))):
        chosen: Any = passes
        fast = normfuse.optimize(model, (x[:4],), dynamic_shapes=({0: Dim("batch")},), passes=chosen)
        report = normfuse.report(fast)
        found[f"{name}_exact"] = None if report.exact is None else report.exact.max_rel
        found[f"{name}_layer_norms"] = report.norms_after.get("layer_norm", 0)
    found["crms_sites"] = sum(len(p.applied) for p in report.passes if p.name == "compress")

    exact = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    parameters = dict(exact.named_parameters())
    expected = _gradients(exact, parameters, x, y)
    rms = convert(exact, to="rms", example_inputs=(x,))
    own = {k.replace("parametrizations.", "").removesuffix(".original"): v for k, v in rms.named_parameters()}
    found["rms_gradient"] = _error(_gradients(rms, own, x, y), expected)
    crms = task.build(task.variant("crms"), data).double()

    def call(x: Tensor) -> Any:
        return torch.func.functional_call(crms, without_one_feature(parameters), (x,), strict=True)

    found["crms_gradient"] = _error(_gradients(call, parameters, x, y), expected)
    return found


def without_one_feature(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the Pre-CRMSNorm model from those of the Pre-LayerNorm model; the last feature is left out."""
    found = {}
    for name, value in parameters.items():
        owner, _, kind = name.rpartition(".")
        reader = next((r for r in _READERS if owner.endswith(r)), None)
        if owner.split(".")[-1].startswith("norm"):
            continue  # γ and β go into the readers
        if reader is not None:
            norm = owner.removesuffix(reader) + _READERS[reader]
            gamma, beta, weight = parameters[f"{norm}.weight"], parameters[f"{norm}.bias"], parameters[f"{owner}.weight"]
            read = weight * gamma
            found[name] = read[:, :-1] - read[:, -1:] if kind == "weight" else value + weight @ beta
        elif name.endswith(_TABLES):
            found[name] = (value - value.mean(-1, keepdim=True))[..., :-1]
        else:
            assert owner.endswith(_WRITERS), f"{name} neither reads nor writes the stream"
            found[name] = (value - value.mean(0))[:-1]
    return found


def _gradients(model: Callable[[Tensor], Any], parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def _error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to the largest gradient."""
    assert got.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    return max(((got[k] - expected[k]).abs().max() / largest).item() for k in expected)
