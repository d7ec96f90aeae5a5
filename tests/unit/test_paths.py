"""Where data, runs, checkpoints and presets are on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli import paths

ROOTS = {
    "FLASHRL_DATA": (paths.data_root, "~/data"),
    "FLASHRL_RUNS": (paths.runs_root, "runs"),
    "FLASHRL_CHECKPOINTS": (paths.checkpoints_root, "checkpoints"),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("name", ROOTS)
def test_roots(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, default = ROOTS[name]
    expected = home / "home/data" if default.startswith("~") else home / "here" / default
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
        assert root() == expected
    for value, found in (("~/x", home / "home/x"), ("x/../y", home / "here/y"), ("/z", Path("/z"))):
        monkeypatch.setenv(name, value)
        assert root() == found


def test_absolute_keeps_links(home: Path) -> None:
    (home / "here/link").symlink_to(home)
    assert paths.absolute("link/a") == home / "here/link/a"


def test_presets_root_has_the_presets() -> None:
    assert (paths.presets_root() / "tiny.yaml").is_file()


def test_dataset() -> None:
    found = paths.DatasetPaths.named("gsm8k")
    assert found.root == paths.data_root() / "gsm8k"
    assert found.split("test") == found.root / "test.parquet"
    assert (found.manifest, found.model) == (found.root / "manifest.json", found.root / "model")


def test_attempts_are_numbers_in_order(tmp_path: Path) -> None:
    run = paths.RunPaths("r", tmp_path / "r", tmp_path / "c")
    assert run.attempts() == []
    for name in ("attempt_10", "attempt_2", "attempt_x", "attempt_", "other"):
        (tmp_path / "r" / name).mkdir(parents=True)
    assert run.attempts() == [2, 10]


def test_a_prepared_model_is_named_by_its_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRL_DATA", str(tmp_path))
    assert paths.prepared_model("prepared:tiny") == tmp_path / "tiny" / "model"
    assert paths.prepared_model("prepared:tiny", Path("/d")) == Path("/d/tiny/model")
    assert paths.prepared_model("Qwen/Qwen2.5-0.5B") is None
