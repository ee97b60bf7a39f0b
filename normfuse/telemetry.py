"""No command of normfuse tells anybody what it runs."""

import os

__all__ = ["no_telemetry"]


def no_telemetry() -> None:
    """Tell ONNX Runtime not to send telemetry, which its wheels do by default from 1.32 on; a choice that the user made stands.

    Works only before onnxruntime is imported. Child processes inherit it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
