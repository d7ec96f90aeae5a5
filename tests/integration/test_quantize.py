"""Models quantized on disk, tensor by tensor against what the online method makes of the same weights."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.quantize import arithmetic, tensors
from flashrl_cli.quantize.inputs import plan
from flashrl_cli.quantize.offline import quantize
from flashrl_cli.runs import merge
from flashrl_cli.weights import read_json
from flashrl_cli.weights.profile import About
from tests.unit.quantize.models import LAYERS, QWEN2, SIZES

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

Tensors = dict[str, "torch.Tensor"]


def weights(dtype: str = "bfloat16", *, tied: bool = False) -> Tensors:
    """Rows that differ much in size, one of zeros, one with a single value."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
        * torch.randn(shape, generator=generator)
        for name, shape in QWEN2.items()
        if not (tied and name == "lm_head.weight")
    }
    for name in LAYERS:
        made[f"{name}.weight"][0] = 0
        made[f"{name}.weight"][1, 1:] = 0
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in made.items()}


def written(folder: Path, found: Tensors, *, files: int = 1, **config: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    names = [f"model-{number + 1:05d}.safetensors" for number in range(files)] if files > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        save_file(dict(list(found.items())[number::files]), folder / name)
    if files > 1:
        weight_map = {name: names[number % files] for number, name in enumerate(found)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    settings = {"model_type": "qwen2", "tie_word_embeddings": False, "torch_dtype": "float32", **SIZES, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").touch()
    return folder


def done(model: Path, scheme: str = "int8", out: str = "out", **asked: Any) -> tuple[Path, dict[str, Any]]:
    target = model.parent / out
    document, there = quantize(
        plan(str(model), target, scheme, asked.pop("ignore", []), asked.pop("profile", None)), str
    )
    assert not there
    return target, document


def read(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_the_online_method(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    from flashrl_cli.plugins.linear import Int8OnlineLinearMethod

    rows, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    Int8OnlineLinearMethod().quantize(weight, rows, scales)
    return rows, scales


def by_the_kernels_formula(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp8 kernel's: max|w| / 448, at least its smallest scale; it exists on CUDA alone."""
    import torch

    scales = (weight.abs().amax(dim=1, keepdim=True).float() / 448).clamp_min(1 / (448 * 512))
    return (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales


METHODS = {"int8": by_the_online_method, "fp8": by_the_kernels_formula}


def assert_same(found: Tensors, model: Tensors, scheme: str) -> None:
    """Layers are what the method makes of them, and everything else is as it was."""
    import torch

    quantized = {f"{name}.weight" for name in LAYERS}
    assert found.keys() == model.keys() | {name.replace(".weight", ".weight_scale") for name in quantized}
    for name, tensor in model.items():
        if name in quantized:
            values, scales = METHODS[scheme](tensor)
            assert found[name].dtype == values.dtype
            assert torch.equal(found[name].view(torch.int8), values.view(torch.int8)), name
            assert torch.equal(found[name.replace(".weight", ".weight_scale")], scales), name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_values_and_scales_are_those_of_the_online_method(dtype: str, scheme: str, tmp_path: Path) -> None:
    """Float32 as a bf16 engine takes it; half as it is."""
    import torch

    model = weights(dtype)
    out, document = done(written(tmp_path / "m", model, dtype=dtype), scheme)
    if dtype == "float32":
        model = {name: tensor.to(torch.bfloat16) for name, tensor in model.items()}
    assert_same(read(out), model, scheme)
    config = read_json(out / "config.json")
    assert config["dtype"] == ("bfloat16" if dtype == "float32" else dtype)
    assert ("torch_dtype" in config) == (dtype != "float32")
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "config.json", "flashrl_quantize.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    check_report(document, model, read(out))


def check_report(document: dict[str, Any], model: Tensors, found: Tensors) -> None:
    assert [layer["name"] for layer in document["layers"]] == sorted(LAYERS)
    for layer in document["layers"]:
        name = f"{layer['name']}.weight"
        exact, values = model[name].double(), found[name].double()
        restored = values * found[f"{name}_scale"].double()
        assert math.isclose(layer["error"], float((exact - restored).norm() / exact.norm()), rel_tol=1e-4)
        assert math.isclose(layer["zeros"], float((values == 0).double().mean()))
        assert layer["clipped"] == 0
        assert layer["after"] == found[name].nbytes + found[f"{name}_scale"].nbytes
    assert document["totals"]["bytes_after"] == sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_very_small_and_very_large_rows(scheme: str, tmp_path: Path) -> None:
    """A scale has a smallest value, below which everything is 0; nothing overflows at the other end."""
    model = weights()
    for power, row in ((-36, 2), (-12, 3), (-8, 4), (20, 5), (37, 6)):
        model[f"{LAYERS[0]}.weight"][row] *= 10.0**power
    out, document = done(written(tmp_path / "m", model), scheme)
    assert_same(read(out), model, scheme)
    assert all(0 < layer["error"] < 0.1 for layer in document["layers"])


def test_two_files_a_tied_head_and_layers_left_alone(tmp_path: Path) -> None:
    """Files stay divided as they were, and the index names what is in them; a copy of the embedding under another name
    goes.
    """
    model = weights()
    model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    folder = written(tmp_path / "m", model, files=2, tie_word_embeddings=True)
    out, document = done(folder, ignore=["re:.*mlp.*"])
    found = read(out)
    assert "lm_head.weight" not in found
    assert sorted(name for name in found if name.endswith("weight_scale")) == [
        f"model.layers.0.self_attn.{name}_proj.weight_scale" for name in "koqv"
    ]
    index = read_json(out / "model.safetensors.index.json")["weight_map"]
    before = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert index.keys() == found.keys()
    assert all(index[name] == before[name.replace("weight_scale", "weight")] for name in index)
    assert document["kept"] == sorted(name for name in LAYERS if ".mlp." in name)
    assert read_json(out / "config.json")["quantization_config"]["ignore"] == ["lm_head", "re:.*mlp.*"]


def test_pieces_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "m", weights("float32"))
    whole, _ = done(folder, "fp8")
    monkeypatch.setattr(tensors, "BLOCK", 600)
    monkeypatch.setattr(arithmetic, "_PIECE", 80)
    in_pieces, _ = done(folder, "fp8", "pieces")
    for file in ("model.safetensors", "config.json"):
        assert (whole / file).read_bytes() == (in_pieces / file).read_bytes()


def test_again_there_is_nothing_to_do(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", weights())
    out, document = done(folder)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantize(plan(str(folder), out, "int8", [], None), str) == (document, True)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(InputError, match="exists already"):
        quantize(plan(str(folder), out, "fp8", [], None), str)
    with pytest.raises(InputError, match="is quantized already: compressed-tensors"):
        plan(str(out), tmp_path / "twice", "int8", [], None)


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    model = weights()
    model["model.layers.0.mlp.up_proj.weight"][3, 3] = math.nan
    folder = written(tmp_path / "m", model)
    with pytest.raises(
        InputError, match=r"m cannot be quantized: 1 tensor with NaN or infinite values: .*up_proj\.weight"
    ):
        done(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "m", weights())

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EnvironmentNotReady, match="out cannot be written: No space left"):
        done(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_profile_is_applied_first(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    model = weights()
    scales = {
        f"{LAYERS[0]}.weight.columns": 2.0 ** torch.arange(-16.0, 16.0),
        "model.norm.weight.rows": torch.full((32,), 0.5),
    }
    about = About(model="m", fingerprint="", shape={}, data="", alpha=None, samples=1, tokens=1, versions={})
    save_file(scales, tmp_path / "profile", metadata=about.metadata())
    out, document = done(written(tmp_path / "m", model), profile=tmp_path / "profile")
    model[f"{LAYERS[0]}.weight"] *= scales[f"{LAYERS[0]}.weight.columns"].bfloat16()
    model["model.norm.weight"] *= 0.5
    assert_same(read(out), model, "int8")
    assert len(document["inputs"]["profile"]) == 64


def test_a_step_of_a_run_is_quantized_as_its_merged_weights_are(
    saved: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP shards of two ranks, a LoRA checkpoint with its base in the shards, and PEFT's adapter on a folder."""
    import torch

    monkeypatch.setattr(merge, "FILE_BYTES", 2**17)
    for name in ("run/global_step_10", "lora/global_step_1", "peft"):
        step, tag = saved[2] / name, name.partition("/")[0]
        wanted = plan(str(step), tmp_path / tag, "int8", [], None)
        document, _ = quantize(wanted, str)
        merge.write(wanted.checkpoint.weights, tmp_path / f"{tag}-merged")
        again = plan(str(tmp_path / f"{tag}-merged"), tmp_path / f"{tag}-again", "int8", [], None)
        assert quantize(again, str)[0]["layers"] == document["layers"]
        ours, theirs = read(tmp_path / tag), read(tmp_path / f"{tag}-again")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert len(list((tmp_path / tag).glob("*.safetensors"))) > 1
        assert read_json(tmp_path / tag / "config.json") == read_json(tmp_path / f"{tag}-again" / "config.json")
