"""A quantized folder knows what it was made of, and a report says what it cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.quantize import offline, report
from flashrl_cli.quantize.arithmetic import FP8, INT8, SCHEMES, Losses, named
from flashrl_cli.quantize.offline import Inputs
from flashrl_cli.quantize.report import Layer, Report
from flashrl_cli.weights import Weights
from tests.unit.quantize.models import hf_model


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
    columns, rows = report.table(json.loads(json.dumps(document)))
    assert len(rows) == 10
    assert len(rows[0]) == len(columns)
    assert rows[0][:2] == ("l12", "4 × 2")
    assert report.summary(document) == (
        "12 layers in 8 bits, 1 kept in 16; 1.0 MiB of weights became 0.5 MiB; relative error 6.500 % in the mean, 12.000 % at worst"
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
