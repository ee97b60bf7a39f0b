"""Hostile Hugging Face folders: nothing runs, nothing is imported or fetched, nothing is written."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfuse.app.source_options import Options
from normfuse.app.sources import load_source
from normfuse.errors import NormfuseError, UsageError
from tests.evil import Evil
from tests.hostile.watch import CODE, MODULE, plant, untouched

pytest.importorskip("transformers")

Change = Callable[[Path], None]
CONFIG = {
    "model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
    "intermediate_size": 16, "vocab_size": 40,
}  # fmt: skip


def config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG | fields))

    return change


def file(name: str, content: Any) -> Change:
    def change(folder: Path) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)

    return change


def shards(place: str) -> Change:
    return file("model.safetensors.index.json", {"metadata": {}, "weight_map": {"pooler.dense.weight": place}})


_EVIL = pickle.dumps(Evil())
FOLDERS: dict[str, tuple[Change, str]] = {
    "function of the library": (config(architectures=["pipeline"]), "'pipeline'"),
    "class of the library that is no model": (config(architectures=["Trainer"]), "'Trainer'"),
    "base of all models": (config(architectures=["PreTrainedModel"]), "'PreTrainedModel'"),
    "attribute of a class": (config(architectures=["BertModel.from_pretrained"]), "BertModel.from_pretrained"),
    "module of the library": (config(architectures=["utils"]), "'utils'"),
    "architecture that is no text": (config(architectures=[{"a": 1}]), "has no model of that name"),
    "code beside it": (config(auto_map={"AutoModel": f"{MODULE}.f"}), "code of its own.*--trust"),
    "code beside it, in a part": (config(text_config={"auto_map": {"AutoModel": f"{MODULE}.f"}}), "code of its own"),
    "code of another repository": (config(auto_map={"AutoModel": "user/repo--code.Model"}), "code of its own"),
    "packed weights": (config(quantization_config={"quant_method": "mxfp4"}), "quantization_config"),
    "kernels to fetch": (config(_attn_implementation="kernels-community/flash-attn"), "kernels that would be fetched"),
    "kernels to fetch, in a part": (config(attn_implementation={"text": "user/kernel:f"}), "kernels that would be fetched"),
    "kernels that may be fetched": (config(attn_implementation="flash_attention_2"), "kernels that would be fetched"),
    "backbone to fetch": (config(backbone="user/repo", use_timm_backbone=True), "a model elsewhere"),
    "backbone with weights to fetch": (config(backbone="resnet18", use_pretrained_backbone=True), "weights from elsewhere"),
    "model of timm to fetch": (config(model_type="timm_wrapper", architecture="hf-hub:user/repo"), "a model elsewhere"),
    "model of timm from a pickle": (
        config(model_type="timm_wrapper", architecture="resnet18", model_args={"checkpoint_path": "x.pth"}),
        "another file",
    ),
    "dtype that is a module": (config(torch_dtype="hub"), "no dtype"),
    "adapter of another model": (file("adapter_config.json", {"base_model_name_or_path": "user/repo"}), "names another model"),
    "weights from elsewhere": (config(transformers_weights="../../x.safetensors"), "weights from elsewhere"),
    "shard from elsewhere": (shards("../../x.safetensors"), "takes weights from"),
    "shard with an absolute name": (shards("/etc/passwd"), "takes weights from"),
    "pickle as weights": (file("pytorch_model.bin", _EVIL), "could not be loaded"),
    "pickle called safetensors": (file("model.safetensors", _EVIL), "could not be loaded"),
    "config that is a list": (file("config.json", [1]), "no object"),
    "config that is no JSON": (file("config.json", b"{"), "cannot be read as JSON"),
    "config that is no UTF-8": (file("config.json", b'{"a": "\xff"}'), "cannot be read as JSON"),
    "config that is nested deeply": (file("config.json", b"[" * 200_000), "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = FOLDERS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    plant(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    config()(folder)
    (folder / f"{MODULE}.py").write_text(CODE)
    change(folder)
    with untouched(tmp_path), pytest.raises(NormfuseError, match=f"(?s){reason}") as error:
        load_source("hf:model")
    assert "should not happen" not in str(error.value)


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model of the library asks the hub for while it is built."""
    import huggingface_hub
    import transformers

    folder = tmp_path / "model"
    folder.mkdir()
    config()(folder)
    asked: list[bool] = []
    real = transformers.AutoConfig.from_pretrained

    def asks(*args: Any, **kwargs: Any) -> Any:
        asked.append(huggingface_hub.constants.is_offline_mode())
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asks)
    before = huggingface_hub.constants.is_offline_mode()
    load_source(f"hf:{folder}")
    assert asked == [True]
    assert huggingface_hub.constants.is_offline_mode() == before


def test_trust_takes_more(tmp_path: Path) -> None:
    """With --trust the folder is handed to transformers as it is."""
    folder = tmp_path / "model"
    folder.mkdir()
    config(torch_dtype="float32", use_pretrained_backbone=True)(folder)
    with pytest.raises(UsageError, match="--trust"):
        load_source(f"hf:{folder}")
    assert type(load_source(f"hf:{folder}", Options(trust=True)).model).__name__ == "BertModel"
