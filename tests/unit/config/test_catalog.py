"""The list of presets."""

from __future__ import annotations

from flashrl_cli.config.catalog import catalog


def test_shipped_presets_and_a_broken_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "broken.yaml").write_text("a: 1\n")
    found = {summary.name: summary for summary in catalog()}
    assert found["dapo-32b"].devices == "4 × 8 GPU"
    assert (found["tiny"].devices, found["tiny"].rollout) == ("CPU", "int8")
    assert found["broken"].error == "preset broken: 5 problems"
    assert [name for name, summary in found.items() if summary.error] == ["broken"]
