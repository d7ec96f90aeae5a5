"""A quantized folder knows what it was made of, and a report says what it cost."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.errors import EnvironmentNotReady, InputError
from flashrl_cli.quantize import layer_errors, offline
from flashrl_cli.quantize.arithmetic import FP8, INT8, SCHEMES, Losses, named
from flashrl_cli.quantize.inputs import Request, check_room, new_profile, plan
from flashrl_cli.quantize.layer_errors import Layer, Report
from flashrl_cli.quantize.offline import Inputs
from flashrl_cli.weights import Weights
from flashrl_cli.weights.profile import About
from tests.saved_files import saved_step
from tests.unit.quantize.models import LAYERS, QWEN2, hf_model


@pytest.fixture
def made_of(tmp_path: Path) -> Inputs:
    return offline.inputs(Weights(hf=hf_model(tmp_path / "m")), "int8", ["b", "a", "a"], None)


def test_inputs(made_of: Inputs, tmp_path: Path) -> None:
    assert (made_of.scheme, made_of.ignore, made_of.profile) == ("int8", ("a", "b"), None)
    assert len(made_of.fingerprint) == 64
    profile = tmp_path / "p"
    profile.write_bytes(b"x")
    other = offline.inputs(Weights(hf=tmp_path / "m"), "int8", ["a", "b"], profile)
    assert other.fingerprint == made_of.fingerprint
    assert other.profile
    assert len(other.profile) == 64


def test_found_again(made_of: Inputs, tmp_path: Path) -> None:
    out = hf_model(tmp_path / "out")
    assert offline.found(out, made_of) is None
    document = offline.write(out, "m", made_of, {"layers": []})
    assert offline.found(out, made_of) == document
    assert document["source"] == "m"
    assert {"flashrl-cli", "python", "torch", "safetensors"} == set(document["versions"])
    assert str(tmp_path) not in (out / offline.FILE).read_text()
    for change in ({"scheme": "fp8"}, {"ignore": ("a",)}, {"profile": "1"}, {"fingerprint": ""}):
        assert offline.found(out, Inputs(**(vars_of(made_of) | change))) is None


def vars_of(made_of: Inputs) -> dict[str, Any]:
    return {name: getattr(made_of, name) for name in ("fingerprint", "scheme", "ignore", "profile")}


def test_a_torn_folder_or_another_version_is_not_found(made_of: Inputs, tmp_path: Path) -> None:
    out = hf_model(tmp_path / "out")
    document = offline.write(out, "m", made_of, {})
    (out / offline.FILE).write_text(json.dumps(document | {"schema_version": 99}))
    assert offline.found(out, made_of) is None
    (out / offline.FILE).write_text("{}")
    assert offline.found(out, made_of) is None
    offline.write(out, "m", made_of, {})
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert offline.found(out, made_of) is None


def layer(name: str, error: float) -> Layer:
    losses = Losses(square=4.0, error=4 * error**2, zeros=2, clipped=1)
    return Layer.of(name, (4, 2), losses, before=16, after=24)


def test_losses_of_a_layer() -> None:
    found = layer("a", 0.5)
    assert (found.error, found.zeros, found.clipped) == (0.5, 0.25, 0.125)
    assert Layer.of("z", (1, 1), Losses(zeros=1), before=2, after=5).error == 0.0
    assert Losses(1, 2, 3, 4) + Losses(1, 1, 1, 1) == Losses(2, 3, 4, 5)


def test_a_report() -> None:
    layers = tuple(layer(f"l{number}", number / 100) for number in range(1, 13))
    document = Report(layers=layers, kept=("lm_head",), before=2**20, after=2**19).document()
    assert math.isclose(document["totals"]["worst_error"], 0.12)
    assert math.isclose(document["totals"]["mean_error"], 0.065)
    assert document["kept"] == ["lm_head"]
    columns, rows = layer_errors.table(json.loads(json.dumps(document)))
    assert len(rows) == 10
    assert len(rows[0]) == len(columns)
    assert rows[0][:2] == ("l12", "4 × 2")
    assert layer_errors.summary(document) == (
        "12 layers in 8 bits, 1 kept in 16; 1.0 MiB of weights became 0.5 MiB; "
        "relative error 6.500 % in the mean, 12.000 % at worst"
    )


def test_schemes_as_compressed_tensors_describes_them() -> None:
    assert [named(name) for name in SCHEMES] == [INT8, FP8]
    found = FP8.config(["lm_head", "re:.*down"])
    (group,) = found["config_groups"].values()
    assert found["quant_method"] == "compressed-tensors"
    assert (found["format"], group["format"], found["ignore"]) == ("float-quantized",) * 2 + (["lm_head", "re:.*down"],)
    assert group["targets"] == ["Linear"]
    bits = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["weights"] == bits | {"strategy": "channel", "dynamic": False}
    assert group["input_activations"] == bits | {"strategy": "token", "dynamic": True}
    assert INT8.config([])["config_groups"]["group_0"]["weights"]["type"] == "int"


EXPERTS: dict[str, tuple[int, ...]] = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": (64, 32) for n in range(2)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def planned(folder: Path, **changes: Any) -> Request:
    asked = {"out": None, "scheme_name": "int8", "ignore": [], "profile": None, **changes}
    return plan(str(folder), **asked)


def test_a_plan(tmp_path: Path) -> None:
    wanted = planned(hf_model(tmp_path / "policy"))
    assert wanted.name == "policy"
    assert wanted.target == tmp_path / "policy-int8"
    assert sorted(wanted.choice.quantized) == sorted(LAYERS)
    assert list(wanted.warnings()) == []
    elsewhere = planned(tmp_path / "policy", out=Path("x"), scheme_name="fp8")
    assert (elsewhere.target, elsewhere.scheme.name) == (tmp_path / "x", "fp8")


def test_a_step_is_called_after_its_run(tmp_path: Path) -> None:
    hf = tmp_path / "run" / "global_step_3" / "actor" / "huggingface"
    hf_model(hf)
    assert planned(tmp_path / "run" / "global_step_3").target == tmp_path / "run-global_step_3-int8"


def refused(folder: Path, **changes: Any) -> tuple[str, str | None]:
    """The message and the hint of an InputError, after which nothing new lies there."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        planned(folder, **changes)
    assert sorted(folder.parent.rglob("*")) == before
    return caught.value.message, caught.value.hint


def test_an_unknown_scheme(tmp_path: Path) -> None:
    message = refused(hf_model(tmp_path / "m"), scheme_name="int4")
    assert message == ("--scheme int4: unknown", "int8 or fp8")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model-Q4_K.gguf"])
def test_other_forms_of_weights(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / name).touch()
    message, hint = refused(folder)
    assert message == f"{folder} has no safetensors, only {name}"
    assert hint
    assert "save_pretrained" in hint


def test_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "names" in refused(tmp_path / "m")[0] or "no model" in refused(tmp_path / "m")[0]


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "fp8"])
def test_what_is_quantized_already(method: str, tmp_path: Path) -> None:
    message, hint = refused(hf_model(tmp_path / "m", quantization_config={"quant_method": method}))
    assert message == f"{tmp_path / 'm'} is quantized already: {method}"
    assert hint == "quantize the model in 16 bits that it was made of"


def test_old_gptq_says_so_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert refused(folder)[0].endswith("is quantized already: gptq")


@pytest.mark.parametrize(
    ("name", "dtype"), [("model.layers.0.mlp.up_proj.qweight", "I32"), ("model.layers.0.mlp.up_proj.weight", "F8_E4M3")]
)
def test_quantized_weights_without_a_word_in_the_config(name: str, dtype: str, tmp_path: Path) -> None:
    message, _ = refused(hf_model(tmp_path / "m", {name: (8, 8)}, dtype))
    assert message == f"the weights are quantized already: {name} ({dtype})"


def test_families_that_are_not_covered(tmp_path: Path) -> None:
    assert refused(hf_model(tmp_path / "a", model_type="gpt2"))[0].startswith("gpt2 stores its weights transposed")
    message, _ = refused(hf_model(tmp_path / "b", vision_config={"depth": 1}))
    assert message == "a model of more than text (vision_config) is not covered"
    message, _ = refused(hf_model(tmp_path / "c", QWEN2 | {"model.layers.1.mixer.A_log": (4, 4)}))
    assert message == "state-space layers are not covered: model.layers.1.mixer.A_log"


def test_experts(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m", QWEN2 | EXPERTS)
    assert refused(folder)[0].startswith("2 matrices of experts, model.layers.0.mlp.experts.0.up_proj")
    (warning,) = planned(folder, ignore=["re:.*experts.*"]).warnings()
    assert warning == "experts stay in 16 bits: 0.00 GiB, 25% of the weights"


def test_odd_shapes_are_told_before(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m", QWEN2 | {"model.layers.0.mlp.down_proj.weight": (32, 20)})
    (warning,) = planned(folder).warnings()
    assert warning.startswith("1 layer with a size that is no multiple of 16 (model.layers.0.mlp.down_proj: 32 × 20)")


def test_torn_files(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    message, hint = refused(folder)
    assert message == f"{folder} cannot be quantized: {file} is torn: truncated or damaged"
    assert hint == "copy or save it again"


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "gone.safetensors" in refused(folder)[0]


@pytest.mark.parametrize("place", [".", "x", "x/y"])
def test_into_the_model_itself(place: str, tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    message, hint = refused(folder, out=folder / place)
    assert message.endswith("is in the model's own folder")
    assert hint == "-o FOLDER elsewhere"


def test_into_the_model_through_a_link(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    (tmp_path / "link").symlink_to(folder)
    assert refused(folder, out=tmp_path / "link" / "x")[0].endswith("is in the model's own folder")


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**32, 2**31, 2**31))
    check_room(tmp_path / "new" / "folder", 2**31)
    with pytest.raises(
        EnvironmentNotReady, match=r"no room for 3\.00 GiB of quantized weights, and 2\.00 GiB are free"
    ):
        check_room(tmp_path / "new" / "folder", 3 * 2**30)


def profile(file: Path, **shape: Any) -> Path:
    """A smoothing profile of one norm."""
    from flashrl_cli.quantize.tensors import Entry, layout

    about = About(model="p", fingerprint="", shape=shape, data="d", alpha=None, samples=1, tokens=1, versions={})
    found = layout([Entry(name="model.norm.weight.rows", dtype="F32", shape=(32,))], about.metadata())
    file.write_bytes(found.head + b"\x00\x00\x80\x3f" * 32)
    return file


def test_profiles(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m", hidden_size=32)
    assert planned(folder, profile=profile(tmp_path / "p", hidden_size=32)).profile
    message, hint = refused(folder, profile=profile(tmp_path / "p", hidden_size=64))
    assert (
        message
        == f"{tmp_path / 'p'} is no profile of {folder}: it was made for p with hidden_size = 64, and the model has 32"
    )
    assert hint == f"flashrl quantize {folder} --calibrate PARQUET"
    assert "is no smoothing profile" in refused(folder, profile=folder / "model.safetensors")[0]
    assert "cannot be read" in refused(folder, profile=tmp_path / "gone")[0]
    lacks = hf_model(tmp_path / "n", {name: shape for name, shape in QWEN2.items() if name != "model.norm.weight"})
    message, _ = refused(lacks, profile=profile(tmp_path / "p"))
    assert "it smooths model.norm.weight, which the model lacks" in message


def test_where_a_new_profile_goes(tmp_path: Path) -> None:
    folder = hf_model(tmp_path / "m")
    assert new_profile(str(folder), None) == (folder, tmp_path / "m-profile.safetensors")
    made = profile(tmp_path / "made")
    assert new_profile(str(folder), made) == (folder, made)
    with pytest.raises(InputError, match="exists already"):
        new_profile(str(folder), folder / "model.safetensors")
    step = saved_step(tmp_path / "run", 1)
    with pytest.raises(InputError, match="no whole model") as caught:
        new_profile(str(step), None)
    assert caught.value.hint == f"flashrl eval {step} --merge FOLDER, then calibrate FOLDER"
