"""Help texts: options in groups of what they are about, and an example of each command."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["Command", "completed_source"]

#: By the names of parameters, in the order in which groups are shown; what stands in none comes last.
GROUPS: dict[str, tuple[str, ...]] = {
    "Model": ("pretrained", "weights", "trust", "seed", "partial"),
    "Inputs": ("shapes", "input", "inputs", "batch", "tokens", "dynamic"),
    "Passes and proof": ("passes", "verify", "tolerance"),
    "Quantization": ("quantize", "keep", "calibration", "samples", "preprocess", "random_calibration", "speed_check"),
    "Data": ("data", "classes", "max_drop"),
    "File": ("output", "target", "opset", "runtime", "attention", "tune", "form", "int4", "dtype", "io_dtype"),
    "Engine": ("profiles", "flavour", "capabilities", "plugins", "dry_run"),
    "Folder of a language model": ("with_past", "last_logits", "padding", "max_length", "proof_tokens", "no_tokenizer"),
    "Model repository": ("repository", "name", "model_version", "backend"),
    "Claim": ("against", "challenger", "at_least"),
    "Measuring": ("device", "graph", "threads", "seconds", "rounds", "warmup", "prompt_tokens", "new_tokens"),
    "Text": ("prompt", "ids", "temperature", "top_p", "top_k"),
}
EXAMPLES = {
    "optimize": "normfuse optimize torchvision:resnet18 -o resnet.pt2",
    "export": "normfuse export timm:vit_tiny_patch16_224 -o vit.onnx --dynamic batch",
    "run": "normfuse run vit.onnx --input images.npy -o answers.npz",
    "generate": "normfuse generate smollm --prompt 'Once upon a time'",
    "bench": "normfuse bench timm:vit_tiny_patch16_224 --against onnxruntime --at-least 1.05",
    "verify": "normfuse verify timm:vit_tiny_patch16_224 vit.onnx",
    "evaluate": "normfuse evaluate timm:vit_tiny_patch16_224 vit.onnx --pretrained --data val",
    "inspect": "normfuse inspect mynet.py:make",
    "passes": "normfuse passes",
    "demo": "normfuse demo",
}


class Command(click.Command):
    """A command whose help shows options by group, with an example at the end."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        of = {name: group for group, names in GROUPS.items() for name in names}
        rows: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows.setdefault(of.get(str(parameter.name), "Output"), []).append(record)
        for group in (*GROUPS, "Output"):
            if group in rows:
                with formatter.section(group if len(rows) > 1 else "Options"):
                    formatter.write_dl(rows[group])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example."""
        if (example := EXAMPLES.get(str(self.name))) is not None:
            with formatter.section("Example"):
                formatter.write(f"{'':>{formatter.current_indent}}{example}\n")


_KINDS = ("timm:", "torchvision:", "hf:")


def completed_source(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Names of models that begin as what was typed, for the shell; files where it is no name of a library."""
    from click.shell_completion import CompletionItem

    kind, colon, start = incomplete.partition(":")
    if not colon:
        kinds = [CompletionItem(k, help="models of the library") for k in _KINDS if k.startswith(incomplete)]
        return [*kinds, CompletionItem(incomplete, type="file")]
    known: list[str] = []
    try:
        if kind == "timm":
            import timm

            known = timm.list_models()
        elif kind == "torchvision":
            from torchvision import models

            known = models.list_models()
    except ImportError:
        return []
    # shells that break words at colons complete what stands behind it
    return [CompletionItem(f"{kind}:{name}") for name in known if name.startswith(start)]
