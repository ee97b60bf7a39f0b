"""Runs that are kept: a training is done once for its configuration, a proof once for its training.

Three files a run in the cache: `<task>-<norm>-s<seed>.json` (accuracy, losses, time), `.safetensors` (the weights) and
`.proof.json`. An interrupted run leaves none of them and starts again.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.training.data import Images, Text
from benchmarks.training.proof import prove
from benchmarks.training.tasks import TASKS, Task
from benchmarks.training.train import measure, train
from normfuse.files import atomic

__all__ = ["Run", "kept", "planned"]

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """One training: a task with a norm and a seed; its files stand in `cache`."""

    task: Task
    norm: str
    seed: int
    cache: Path

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.norm}-s{self.seed}"

    @property
    def is_proven(self) -> bool:
        """Every seed is optimized and exported where nothing of the norm may be left, the first one elsewhere."""
        return self.seed == 0 or self.task.variant(self.norm).plain is not None

    def known(self) -> dict[str, Any] | None:
        """The figures in the cache; None where the run is missing or was done with another configuration."""
        found = _read(self.cache / f"{self.name}.json")
        whole = (self.cache / f"{self.name}.safetensors").exists()
        return found if found is not None and whole and found["config"] == self._config else None

    def known_proof(self) -> dict[str, Any] | None:
        """The proof in the cache, or None."""
        return _read(self.cache / f"{self.name}.proof.json")

    @property
    def _config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(self.task.config(self.norm)))
        return found

    def trained(self, *, force: bool = False, on_step: Callable[[int], None] | None = None) -> dict[str, Any]:
        """The figures of the training, from the cache if it is there with the same configuration.

        Raises:
            MissingExtra: the package with the data is not installed.
        """
        known = None if force else self.known()
        if known is not None:
            return known
        data = _data(self.task)
        torch.manual_seed(self.seed)
        model = self.task.build(self.task.variant(self.norm), data)
        start, cpu = time.perf_counter(), time.process_time()
        outcome = train(model, data, self.task.recipe, seed=self.seed, on_step=on_step)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        figures = measure(model, data, self.task.recipe)
        del figures["predictions"]
        found = {
            "schema": SCHEMA,
            "task": self.task.name,
            "norm": self.norm,
            "seed": self.seed,
            **figures,
            "finite": outcome.finite,
            "losses": outcome.losses,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": seconds,
            "cpu_seconds": cpu,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "config": self._config,
        }
        (self.cache / f"{self.name}.proof.json").unlink(missing_ok=True)  # it was about other weights
        with atomic(self.cache / f"{self.name}.safetensors", force=True) as path:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        _write(self.cache / f"{self.name}.json", found)
        return found

    def proven(self, *, force: bool = False) -> dict[str, Any]:
        """What is left of the norm after `optimize` and export, from the cache if it is there. Needs the weights."""
        known = None if force else self.known_proof()
        if known is not None:
            return known
        data = _data(self.task)
        model = self.task.build(self.task.variant(self.norm), data)
        model.load_state_dict(load_file(self.cache / f"{self.name}.safetensors"))
        found = {"schema": SCHEMA, **prove(self.task, self.norm, model.eval(), data)}
        _write(self.cache / f"{self.name}.proof.json", found)
        return found


def planned(cache: Path, tasks: tuple[str, ...], norms: tuple[str, ...], seeds: int | None) -> tuple[Run, ...]:
    """The runs of these tasks, one seed of everything first; empty `tasks` and `norms` stand for all."""
    chosen = [TASKS[name] for name in tasks or TASKS]
    last = max(seeds or t.seeds for t in chosen)
    return tuple(
        Run(task, norm, seed, cache)
        for seed in range(last)
        for task in chosen
        for norm in task.variants
        if seed < (seeds or task.seeds) and (not norms or norm in norms)
    )


def kept(cache: Path) -> tuple[Run, ...]:
    """All runs that the cache holds, of any configuration."""
    return tuple(
        Run(task, norm, seed, cache)
        for task in TASKS.values()
        for norm in task.variants
        for seed in sorted(_seeds(cache, f"{task.name}-{norm}-s"))
    )


def _seeds(cache: Path, start: str) -> Iterator[int]:
    for path in cache.glob(f"{start}*.json"):
        seed = path.name.removeprefix(start).removesuffix(".json")
        if seed.isdecimal():  # and no proof
            yield int(seed)


@cache
def _read_data(read: Callable[[], Images | Text]) -> Images | Text:
    return read()


def _data(task: Task) -> Images | Text:
    return _read_data(task.data)


def _read(path: Path) -> dict[str, Any] | None:
    """A file of this schema; None for one that is missing, broken or of another time."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def _write(path: Path, found: dict[str, Any]) -> None:
    with atomic(path, force=True) as partial:
        partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
