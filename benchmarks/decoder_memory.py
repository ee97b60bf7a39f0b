"""Memory that the folder of a decoder of a given size takes to write, with random weights in bfloat16 and a tied head.

    python -m benchmarks.decoder_memory --layers 28 --hidden 1536 --inner 8960 --heads 12 --vocabulary 151936

Peaks are of the memory that the process owns (RssAnon), beyond what it has before there is a model, sampled every 10 ms, in
multiples of the weights in bfloat16. The model itself is one of them.
"""

from __future__ import annotations

import gc
import tempfile
import threading
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from normfuse.app.decoders import to_decoder
from normfuse.telemetry import no_telemetry

__all__ = ["main"]


def _owned() -> int:
    """Bytes that this process has for itself."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@click.command()
@click.option("--layers", default=8, show_default=True)
@click.option("--hidden", default=768, show_default=True)
@click.option("--inner", default=4480, show_default=True)
@click.option("--heads", default=12, show_default=True)
@click.option("--vocabulary", default=50000, show_default=True)
@click.option("--quantize", default="w4", show_default=True)
@click.option("--proof-tokens", default=4, show_default=True)
@click.option("--verify", type=click.Choice(("end", "off")), default="end", show_default=True)
def main(layers: int, hidden: int, inner: int, heads: int, vocabulary: int, quantize: str, proof_tokens: int, verify: str) -> None:
    no_telemetry()
    for module in ("onnx", "onnxscript", "onnxruntime"):
        __import__(module)
    before = _owned()
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    made_of: Any = transformers.Qwen2ForCausalLM(config)
    model = made_of.eval()
    torch.set_default_dtype(torch.float32)
    gc.collect()
    weights = sum(2 * p.numel() for p in model.parameters())
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _owned())

    watching = threading.Thread(target=watch)
    watching.start()
    with tempfile.TemporaryDirectory() as folder:
        made = to_decoder(
            model, Path(folder) / "out", quantize=quantize, proof_tokens=proof_tokens, prompts=[[5, 6, 7]], verify=verify,  # type: ignore[arg-type]
            in_place=True,
        )  # fmt: skip
    done.set()
    watching.join()
    click.echo(f"{made}\n\nweights {weights / 1e6:.0f} MB in bfloat16; peak {(peak[0] - before) / weights:.2f} times that")


if __name__ == "__main__":
    main()
