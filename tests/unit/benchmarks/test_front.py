"""benchmarks/front.py joins documents of `flashrl bench` as they are in benchmarks/results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import front

from flashrl_cli.bench.report import speed_up

RESULTS = Path(front.__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    """A document of benchmarks/results."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


KL, SPEED = read("mismatch_gpu_wide"), read("bench_7b_h200")


def test_the_kl_of_one_model_beside_the_speed_of_another() -> None:
    found = front.combined([KL], [SPEED])
    (model,) = found["models"]
    assert (found["kl"][0]["model"], model["model"]) == ("wide", "shape:7b")
    assert model["without_kl"] == []
    assert "bf16+head32" in model["without_speed"]
    assert [one["batch"] for one in model["fronts"]] == SPEED["settings"]["batches"]
    kl = {one["rollout"]: one["mismatch"]["kl"]["k3"] for one in KL["variants"]}
    for one, by_batch in zip(model["fronts"], zip(*(v["speed"] for v in SPEED["variants"]), strict=True), strict=True):
        points = {point["rollout"]: point for point in one["points"]}
        assert list(points) == [variant["rollout"] for variant in SPEED["variants"]]
        assert all(point["kl"] == kl[name] for name, point in points.items())
        base = by_batch[0]["values"]
        for point, measured in zip(one["points"][1:], by_batch[1:], strict=True):
            assert speed_up(point["values"], base).value == pytest.approx(measured["speed_up"]["value"], abs=1e-4)


def test_a_table_has_a_column_for_each_model_and_batch() -> None:
    other = copy.deepcopy(SPEED)
    other["model"]["name"] = "shape:32b"
    other["variants"] = [one for one in other["variants"] if one["rollout"] != "fp8+kv8"]
    head, _, *rows = front.table(front.combined([KL], [SPEED, other])).splitlines()
    assert head.endswith("| 7b, 64 sequences | 7b, 256 sequences | 32b, 64 sequences | 32b, 256 sequences |")
    assert rows[0].startswith("| `bf16` | 2.7e-05 | 100.0 % | **8,956** |")
    assert rows[-1].startswith("| `fp8+kv8` | 0.0009 |")
    assert rows[-1].endswith("| – | – |")


def test_the_command_writes_a_document_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, png = tmp_path / "front.json", tmp_path / "front.png"
    words = ["--kl", str(RESULTS / "mismatch_gpu_wide.json"), "--speed", str(RESULTS / "bench_7b_h200.json")]
    front.main([*words, "--out", str(out), "--png", str(png)])
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["command"].startswith("python -m benchmarks.front --kl mismatch_gpu_wide.json --speed bench_7b_h2")
    assert png.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "shape:7b, at 64 sequences, by speed and KL: take int8, 1.27x of bf16" in said
    assert "shape:7b: without a speed, and left out: bf16+kv8, " in said


def test_the_kl_of_one_model_may_be_in_several_documents() -> None:
    parts = [{**KL, "variants": KL["variants"][:3]}, {**KL, "variants": KL["variants"][3:]}]
    assert front.combined(parts, [SPEED])["models"] == front.combined([KL], [SPEED])["models"]


@pytest.mark.parametrize(
    ("kl", "speeds", "problem"),
    [
        ([SPEED], [SPEED], "shape:7b gave no mismatch"),
        ([KL, read("mismatch_gpu_tiny")], [SPEED], "differ in model"),
        ([KL], [SPEED, SPEED], "two documents of shape:7b"),
        ([KL], [KL], "no batch of wide"),
    ],
)
def test_documents_that_do_not_fit_are_refused(kl: list[Any], speeds: list[Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        front.combined(kl, speeds)
