"""When a plugin loads its kernel: before it runs, whoever runs it; never because an engine is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)

from normfuse.errors import ExportError  # noqa: E402
from normfuse.export.tensorrt.plugins import kernel as kernels  # noqa: E402
from normfuse.export.tensorrt.plugins import plugin as plugins  # noqa: E402
from normfuse.export.tensorrt.plugins.payload import TEXTS, Code, Payload  # noqa: E402
from tests.gpu.rehearsal import Driver  # noqa: E402

PAYLOAD = Payload("norm", (Code(80, False, 128, 0, 5, b".target sm_80"),), 1, 1, ("fp16",), ("fp16",), (64,))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver(80)
    monkeypatch.setattr(plugins, "need", lambda module, extra: found)
    monkeypatch.setattr(kernels, "_functions", {})
    return found


@pytest.fixture
def plugin() -> Any:
    (creator,) = plugins._creators(trt, ["RmsNorm"])
    fields = [
        SimpleNamespace(name=name, data=value.encode() if name in TEXTS else value) for name, value in PAYLOAD.fields().items()
    ]
    return creator.create_plugin("norm", fields, None)


def _run(plugin: Any) -> None:
    plugin.enqueue([SimpleNamespace(dims=(4, 64))], None, (0x1000,), (0x2000,), 0, 0x55)


def test_a_copy_of_a_context_is_loaded_with_it(plugin: Any, driver: Driver) -> None:
    attached = plugin.attach_to_context(None)
    assert attached.kernel is not None
    assert plugin.kernel is None
    _run(attached)
    assert len(driver.launched) == 1


def test_a_copy_that_a_builder_times_is_loaded_when_it_is_prepared(plugin: Any, driver: Driver) -> None:
    copy = plugin.clone()
    copy.configure_plugin(None, None)
    assert copy.kernel is None
    copy.on_shape_change(None, None)
    kernel = copy.kernel
    assert kernel is not None
    _run(copy)
    copy.on_shape_change(None, None)
    assert copy.kernel is kernel
    assert len(driver.launched) == 1


def test_a_copy_that_nobody_has_prepared_is_loaded_when_it_runs(plugin: Any, driver: Driver) -> None:
    _run(plugin.clone())
    assert len(driver.launched) == 1


def test_without_a_device_an_engine_is_built_and_not_run(plugin: Any, driver: Driver) -> None:
    driver.capability = 75
    copy = plugin.clone()
    copy.on_shape_change(None, None)
    for run in (lambda: _run(copy), lambda: plugin.attach_to_context(None)):
        with pytest.raises(ExportError, match="the plugin norm carries PTX for sm_80; the device is sm_75"):
            run()
