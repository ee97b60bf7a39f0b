"""Interleaved latency comparison: who runs when, what the clock said, and how sure that is.

Knows no runtime: an `Engine` is a name and something that opens it. `normfuse.app.engines` holds the runtimes.
"""

from normfuse.benchmark.comparison import Comparison, Timing, Verdict
from normfuse.benchmark.engine import Engine
from normfuse.benchmark.interleave import Measurement, Schedule, measure
from normfuse.benchmark.machine import Machine
from normfuse.benchmark.statistics import Interval

__all__ = ["Comparison", "Engine", "Interval", "Machine", "Measurement", "Schedule", "Timing", "Verdict", "measure"]
