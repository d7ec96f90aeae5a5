"""A checkpoint's fingerprint tells other weights from the same ones elsewhere; what is torn is found without torch."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrl_cli.weights import Unreadable, Weights
from flashrl_cli.weights.lora import Adapter, is_lora, unwrapped
from tests.saved_files import saved_model, saved_tensors


def hf_model(folder: Path) -> Path:
    saved_tensors(folder / "model.safetensors", **{"a.weight": bytes(20_000), "b.weight": bytes(10)})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def sharded(root: Path) -> Weights:
    actor = saved_model(root / "actor")
    return Weights(hf=actor / "huggingface", shards=tuple(sorted(actor.glob("model_*.pt"))))


def whole(root: Path) -> Weights:
    return Weights(hf=hf_model(root / "hf"))


def adapted(root: Path) -> Weights:
    base = hf_model(root / "base")
    saved_tensors(root / "adapter" / "adapter_model.safetensors", A=bytes(8), B=bytes(8))
    (root / "adapter" / "adapter_config.json").write_text("{}")
    return Weights(hf=base, adapter=root / "adapter", base=base)


def lora_of_verl(root: Path) -> Weights:
    actor = saved_model(root / "actor")
    (actor / "lora_train_meta.json").write_text('{"r": 8, "lora_alpha": 16}')
    shards = tuple(sorted(actor.glob("model_*.pt")))
    return Weights(hf=actor / "huggingface", shards=shards, adapter=actor, base=hf_model(root / "base"))


KINDS = [sharded, whole, adapted, lora_of_verl]
Kind = Callable[[Path], Weights]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_the_same_fingerprint(kind: Kind, tmp_path: Path) -> None:
    before = kind(tmp_path / "one").fingerprint()
    shutil.rmtree(tmp_path / "one")
    again = kind(tmp_path / "another" / "place")
    for file in (tmp_path / "another").rglob("*"):
        os.utime(file, (1, 1))
    (again.hf / "eval.log").write_text("not of the model")
    again.check()
    assert again.fingerprint() == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_counts(kind: Kind, tmp_path: Path) -> None:
    weights = kind(tmp_path)
    seen = {weights.fingerprint()}
    unread = ("optim", "extra", "fsdp_config")
    files = [f for f in sorted(tmp_path.rglob("*")) if f.is_file() and not f.name.startswith(unread)]
    files = [f for f in files if f.parent.name != "base" or f.name != "tokenizer.json" or weights.hf == weights.base]
    for file in files:
        kept = file.read_bytes()
        if file.suffix == ".pt":
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr("model/data/99", "more")
        elif file.suffix == ".safetensors":
            file.write_bytes(kept[:-1] + b"\x07")
        else:
            file.write_text('{"other": 1}')
        found = weights.fingerprint()
        assert found not in seen, file
        seen.add(found)
        file.write_bytes(kept)
    assert len(files) >= 3


@pytest.mark.parametrize("place", [0, -1])
def test_both_ends_of_a_tensor_count(place: int, tmp_path: Path) -> None:
    tensor = bytearray(12_000)
    file = saved_tensors(tmp_path / "model.safetensors", a=bytes(tensor), b=bytes(12_000))
    before = Weights(hf=tmp_path).fingerprint()
    tensor[place] = 1
    saved_tensors(file, a=bytes(tensor), b=bytes(12_000))
    assert Weights(hf=tmp_path).fingerprint() != before


@settings(deadline=None)
@given(data=st.data())
def test_training_one_tensor_changes_it(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Noise on all of a tensor, as training leaves it, whatever the sizes of the tensors."""
    folder = tmp_path_factory.mktemp("noise")
    tensors = {name: bytes(data.draw(st.integers(1, 12_000))) for name in "abc"}
    file = saved_tensors(folder / "model.safetensors", **tensors)
    before = Weights(hf=folder).fingerprint()
    trained = data.draw(st.sampled_from("abc"))
    noise = data.draw(st.binary(min_size=16, max_size=16))
    size = len(tensors[trained])
    moved = bytes(byte | 1 for byte in noise) * (size // len(noise) + 1)
    saved_tensors(file, **tensors | {trained: moved[:size]})
    assert Weights(hf=folder).fingerprint() != before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_torn_is_named(kind: Kind, tmp_path: Path) -> None:
    weights = kind(tmp_path)
    weights.check()
    holding = [*weights.shards, *([] if weights.shards else [weights.hf / "model.safetensors"])]
    if weights.adapter and not weights.shards:
        holding.append(weights.adapter / "adapter_model.safetensors")
    for file in holding:
        kept = file.read_bytes()
        file.write_bytes(kept[:-1])
        for look in (weights.check, weights.fingerprint):
            with pytest.raises(Unreadable, match=f"{file.name} is torn"):
                look()
        file.write_bytes(kept)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 2}}, "alpha_pattern, rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"a_method_to_come": {"x": 1}}, "a_method_to_come"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(setting: dict[str, object], named: str, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 8, "bias": "none", "peft_type": "LORA", "use_dora": False, "modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert Adapter.read(tmp_path).scale == 2
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | setting))
    with pytest.raises(Unreadable, match=f"asks for what cannot be merged: {named}$"):
        Adapter.read(tmp_path)


def test_the_scale_of_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"lora_train_meta\.json cannot be read"):
        Adapter.read(tmp_path)
    meta = tmp_path / "lora_train_meta.json"
    meta.write_text('{"r": 16, "lora_alpha": 8, "task_type": "CAUSAL_LM"}')
    with pytest.raises(Unreadable):
        Adapter.read(tmp_path / "elsewhere")
    assert Adapter.read(tmp_path).scale == 0.5
    (tmp_path / "adapter_config.json").write_text(
        '{"r": 16, "lora_alpha": 8, "use_rslora": true, "fan_in_fan_out": true}'
    )
    assert Adapter.read(tmp_path).scale == 2
    assert Adapter.read(tmp_path).transposed
    for text in ('{"lora_alpha": 8}', '{"r": 0, "lora_alpha": 8}', '{"r": "x", "lora_alpha": 8}', '{"r": 1}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(Unreadable, match="names no rank and alpha"):
            Adapter.read(tmp_path)


def test_names_in_the_wrapped_model() -> None:
    assert unwrapped("base_model.model.model.layers.0.q_proj.base_layer.bias") == "model.layers.0.q_proj.bias"
    assert unwrapped("model.norm.weight") == "model.norm.weight"
    assert is_lora("base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    assert not is_lora("model.layers.0.q_proj.weight")
