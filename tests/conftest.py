"""Every test starts from the same seeds, on one thread, without a hub."""

import gc
import logging
import os
import random
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers or huggingface_hub is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime is imported

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: a run of the suite is repeatable. HYPOTHESIS_PROFILE=search looks for new examples, and longer.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("repeatable", derandomize=True, max_examples=40, **_COMMON)
settings.register_profile("search", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Tests are spread over processes; threads inside each of them would fight for the same cores.
torch.set_num_threads(1)


_LOGGER = logging.getLogger("normfuse")
_LEVEL = _LOGGER.level


def pytest_collection_finish() -> None:
    """Modules and tests stay for good, so that the collector need not walk over them again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    """The command line, called in this process, sets how much the library tells; a fixture of a whole file may have called it."""
    _LOGGER.setLevel(_LEVEL)
    yield
    _LOGGER.setLevel(_LEVEL)


def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the global state, which models read
    random.seed(0)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    _seeded()


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file of tests draws when it is imported must not depend on which files were collected before it."""
    if isinstance(collector, pytest.Module):
        _seeded()
