"""What `docs/results.md` is made of: `python -m benchmarks` measures all of it."""

from normfuse.telemetry import no_telemetry

no_telemetry()
