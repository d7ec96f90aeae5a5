"""The list of presets."""

from __future__ import annotations

from flashrl_cli.config.resolve import catalog


def test_shipped_presets_and_a_broken_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "broken.yaml").write_text("a: 1\n")
    found = {summary.name: summary for summary in catalog()}
    assert (found["dapo-32b"].devices, found["dapo-32b"].gpus, found["dapo-32b"].tis) == ("4 × 8", 32, None)
    assert (found["gsm8k-0.5b"].devices, found["gsm8k-0.5b"].gpus) == ("4", 4)
    tiny = found["tiny"]
    assert (tiny.devices, tiny.gpus, tiny.rollout, tiny.tis) == ("CPU", 0, "int8", 2)
    assert str(found["broken"].error).startswith("preset broken: ")
    assert [name for name, summary in found.items() if summary.error] == ["broken"]
