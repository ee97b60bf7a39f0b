"""What other tools call: torch.compile, pytest, exporters and quantizers that know normfuse by name."""
