"""Capture without example inputs: fx tracing, and one table to ATen."""
