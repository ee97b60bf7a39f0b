"""Names in the file are those of the model, whatever they meet."""

import onnxruntime
import torch
from torch import nn

import normfuse
from normfuse.export import to_onnx


class Tied(nn.Module):
    """Outputs are called like weights, and one is a weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.pos, self.logit_scale = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(()))

    def forward(self, x):
        y = self.linear(x) + self.pos
        return {"pos": y, "logit_scale": y * self.logit_scale.exp(), "y": self.pos}


@torch.no_grad()
def test_an_output_may_be_called_like_a_weight(tmp_path):
    model, x = Tied().eval(), torch.randn(4, 8)
    to_onnx(normfuse.optimize(model, (x,)), tmp_path / "m.onnx", progress=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"x": x.numpy()}), strict=True))
    for name, expected in model(x).items():
        torch.testing.assert_close(torch.from_numpy(found[name]), expected)
