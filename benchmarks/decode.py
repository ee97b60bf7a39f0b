"""One token of a decoder of GPT-2 small's shape, with its cache of keys and values: ours against what people use today.

    python -m benchmarks.decode --seconds 60
    python -m benchmarks.decode --past 255 --bits 4 --untied --only nbits_128 --only shiftquant

All engines are ONNX Runtime with everything bound once (IO binding) and one buffer for past and present keys and values; what is
timed is a call of the bound session. Ratios are against the fastest of the others. Results go to benchmarks/results/.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import onnx
import torch
from onnx import ModelProto
from rich.console import Console

from benchmarks import decoder
from benchmarks.command import exit_code
from benchmarks.decoder import GPT2_SMALL, Decoder, Packed, Session, Shape, Weights
from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.benchmark.machine import cores
from normfuse.files import atomic
from normfuse.progress import progress_bar
from normfuse.quant.spec import ShiftQuant

__all__ = ["TITLES", "agreement", "main", "make"]

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "fp32": "ONNX Runtime, fp32",
    "dynamic": "ONNX Runtime, int8 dynamic",
    "nbits_128": "ONNX Runtime, MatMulNBits 4 bit, block 128, level 4",
    "nbits_32": "ONNX Runtime, MatMulNBits 4 bit, block 32, level 4",
    "shiftquant": "normfuse, ShiftQuant, native kernels",
    "shiftquant_plain": "normfuse, ShiftQuant without shifts (groups=1)",
    "shiftquant_32": "normfuse, ShiftQuant, blocks of 32",
    "shiftquant_64": "normfuse, ShiftQuant, blocks of 64",
}
OURS = ("shiftquant", "shiftquant_plain", "shiftquant_32", "shiftquant_64")
_console = Console(stderr=True, soft_wrap=True)


def make(name: str, shape: Shape, w: Weights, folder: Path, layers: dict[str, Packed] | None = None) -> Path:
    """The file of one engine; ours needs its quantized layers."""
    path = folder / f"{name}.onnx"
    if layers is not None:
        _save(decoder.shiftquant_model(shape, w, layers), path)
        return path
    original = folder / "fp32.onnx"
    if not original.exists():
        _save(decoder.float_model(shape, w), original)
    if name == "dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(original), str(path), op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
            use_external_data_format=True, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )  # fmt: skip
    elif name != "fp32":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        block = int(name.rpartition("_")[2])
        quantizer = MatMulNBitsQuantizer(onnx.load(str(original)), block_size=block, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        _save(_with_bias(quantizer.model.model), path)
    return path


def spec(name: str, bits: int) -> ShiftQuant:
    """Speed does not depend on how exponents are found."""
    if name.endswith(("_32", "_64")):
        return ShiftQuant(weight_bits=bits, block=int(name[-2:]))
    return ShiftQuant(weight_bits=bits, groups=1 if name == "shiftquant_plain" else 4, exponents="range")


def _save(model: ModelProto, path: Path) -> None:
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")


def _with_bias(model: ModelProto) -> ModelProto:
    """MatMulNBits adds the bias itself, which its quantizer leaves to an Add."""
    nodes = model.graph.node
    constants = {i.name for i in model.graph.initializer}
    made = {n.output[0]: n for n in nodes if n.op_type == "MatMulNBits"}
    for add in [n for n in nodes if n.op_type == "Add" and n.input[0] in made and n.input[1] in constants]:
        product = made[add.input[0]]
        product.input.extend([""] * (5 - len(product.input)) + [add.input[1]])
        product.output[0] = add.output[0]
        nodes.remove(add)
    return model


def agreement(
    files: dict[str, Path], shape: Shape, w: Weights, quantized: dict[str, dict[str, Packed]], steps: int = 4
) -> dict[str, dict[str, float]]:
    """‖x - y‖ / ‖y‖ of the logits over a few tokens, against fp32 in PyTorch; ours also against its definition."""
    references = {"fp32": Decoder.of(shape, w)} | {n: decoder.reference(shape, w, layers) for n, layers in quantized.items()}
    tokens = [(i * 7919 + 3) % shape.vocabulary for i in range(steps)]
    wanted = {n: torch.stack([r.step(t, i) for i, t in enumerate(tokens)]) for n, r in references.items()}
    found = {}
    for name, path in files.items():
        session = Session(path, shape, 1)
        logits = torch.stack([session.step(t, i) for i, t in enumerate(tokens)])
        found[name] = {"fp32": _relative(logits, wanted["fp32"])}
        if name in quantized:
            found[name]["definition"] = _relative(logits, wanted[name])
    return found


def _relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@click.command()
@click.option("--only", type=click.Choice(tuple(TITLES)), multiple=True, help="Engines; default: all.")
@click.option("--past", type=click.IntRange(0, GPT2_SMALL.room - 1), default=GPT2_SMALL.room - 1, show_default=True)
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True, help="Of our weights.")
@click.option("--tied/--untied", default=True, show_default=True, help="Whether the head is the token embedding.")
@click.option("--threads", type=click.IntRange(1), default=len(cores()), show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Time for measuring.")
@click.option("--restarts", type=click.IntRange(1), default=3, show_default=True, help="How often all processes are started anew.")
@click.option("--check/--no-check", default=True, show_default=True, help="Compare logits before timing.")
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
def command(
    only: tuple[str, ...], past: int, bits: int, tied: bool, threads: int, seconds: float, restarts: int, check: bool, results: Path
) -> None:
    """Measure one token of decoding."""
    results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    shape = Shape(tied=tied)
    w = decoder.random_weights(shape)
    names = [n for n in TITLES if not only or n in only]
    with tempfile.TemporaryDirectory(prefix="normfuse-decode-") as folder:
        files, quantized = {}, {}
        for name in names:
            _console.print(f"  making {TITLES[name]}")
            if name in OURS:
                quantized[name] = decoder.quantized(shape, w, spec(name, bits))
            files[name] = make(name, shape, w, Path(folder), quantized.get(name))
        errors = agreement(files, shape, w, quantized) if check else {}
        for name, error in errors.items():
            _console.print(f"  {TITLES[name]}: " + ", ".join(f"{e:.2e} from {what}" for what, e in error.items()))
        del w, quantized
        data = _measured(files, shape, past, Schedule(seconds=seconds, threads=threads, restarts=restarts))
    title = f"GPT-2 small's shape, one token behind {past}, {'tied' if tied else 'untied'} head, {bits} bits"
    data |= {"title": title, "past": past, "bits": bits, "tied": tied, "errors": errors}
    stem = f"decode-past{past}-{'tied' if tied else 'untied'}-w{bits}-t{threads}"
    with atomic(results / f"{stem}.json", force=True) as file:
        file.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    _console.print(_table(data))


def _measured(files: dict[str, Path], shape: Shape, past: int, schedule: Schedule) -> dict[str, Any]:
    engines = {n: Engine(TITLES[n], partial(decoder.open_decoder, str(p), shape, past)) for n, p in files.items()}
    # the fastest of the others is the baseline; which one that is, a short look says
    others = [n for n in engines if n not in OURS] or list(engines)[:1]
    base = others[0]
    if len(others) > 1:
        quick = measure([engines[n] for n in others], Schedule(rounds=3, threads=schedule.threads, restarts=1))
        medians = {n: sorted(row[i] for row in quick.medians)[1] for i, n in enumerate(others)}
        base = min(others, key=medians.__getitem__)
    order = [n for n in engines if n != base]
    with progress_bar("decode") as bar:
        found = measure([engines[base], engines[base], *(engines[n] for n in order)], schedule, on_round=bar.to)
    rows = {n: Comparison.of(found, a=0, again=1, b=2 + i).to_dict() for i, n in enumerate(order)}
    return {"base": base, "itself": Comparison.of(found, a=0, again=1, b=1).to_dict(), "engines": rows}


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _table(data: dict[str, Any]) -> str:
    a = data["itself"]["a"]
    lines = [
        f"{data['title']}, {data['itself']['threads']} threads",
        f"baseline: {TITLES[data['base']]}, {a['median']:.3f} ms (fastest {a['minimum']:.3f}), "
        f"against itself {_interval(data['itself']['speedup'])}",
        "",
        "| engine | ms | fastest ms | speedup |",
        "|---|---|---|---|",
    ]
    for name, c in sorted(data["engines"].items(), key=lambda item: item[1]["b"]["median"]):
        lines.append(f"| {TITLES[name]} | {c['b']['median']:.3f} | {c['b']['minimum']:.3f} | {_interval(c['speedup'])} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.decode", args)


if __name__ == "__main__":
    sys.exit(main())
