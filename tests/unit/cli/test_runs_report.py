"""`flashrl runs plot` and `flashrl runs report`, as people and programs call them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from flashrl_cli.cli import runs as commands
from flashrl_cli.errors import EnvironmentNotReady, InputError, NothingMatched
from flashrl_cli.machine import software
from flashrl_cli.render import figure
from flashrl_cli.runs.curves import DEFAULTS, SMOOTHING
from tests.unit.runs.on_disk import a_run, an_attempt, log, training, write_record

app = typer.Typer()
app.command("plot")(commands.plot)
app.command("report")(commands.report)


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two runs, in a working folder without other files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        run = a_run(name)
        log(run, 1, {step: training(step / 10) for step in range(1, 6)})
        write_record(run, [an_attempt()])


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def document(*arguments: str) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_curves_in_the_terminal() -> None:
    result = call("plot", "a", "b")
    assert result.exit_code == 0
    assert result.stdout.startswith("● a   ○ b")
    assert "reward" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_one_name_twice_is_one_run() -> None:
    assert {one["run"] for one in document("plot", "a", "a")["curves"]} == {"a"}


def test_curves_as_data() -> None:
    found = document("plot", "a", "--metric", "kl", "--smooth", "0")
    assert [one["metric"] for one in found["curves"]] == ["kl"]
    assert found["smoothing"] == 0


def test_pictures_are_written_and_told_on_stderr() -> None:
    result = call("plot", "a", "b", "--png", "out/a.png", "--html", "a.html")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "written to out/a.png" in result.stderr
    assert Path("out/a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("a.html").read_text(encoding="utf-8")


def test_the_page_says_how_it_is_drawn() -> None:
    call("plot", "a", "--html", "a.html", "--smooth", "0.25")
    assert "weight 0.25" in Path("a.html").read_text(encoding="utf-8")
    call("plot", "a", "--html", "a.html", "--smooth", "0")
    assert "moving average" not in Path("a.html").read_text(encoding="utf-8")


def test_what_a_run_lacks_is_a_warning() -> None:
    log(a_run("c"), 1, {1: training(kl=None)})
    result = call("plot", "a", "c", "--metric", "kl,reward")
    assert result.exit_code == 0
    assert "warning: no kl in c" in result.stderr


@pytest.mark.parametrize("option", ["--png", "--html"])
def test_a_folder_is_no_file(option: str) -> None:
    Path("folder").mkdir()
    assert call("plot", "a", option, "folder").exit_code == 2
    assert not list(Path("folder").iterdir())


@pytest.mark.parametrize("weight", ["-0.1", "1", "nan", "inf"])
def test_a_weight_that_is_none(weight: str) -> None:
    with pytest.raises(InputError, match="--smooth"):
        call("plot", "a", f"--smooth={weight}")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("plot", "nobody"), NothingMatched),
        (("plot", "a", "nobody"), NothingMatched),
        (("plot", "a", "--metric", "rewrd"), InputError),
        (("report", "nobody"), NothingMatched),
    ],
)
def test_what_is_not_there_is_an_error_and_nothing_is_written(
    arguments: tuple[str, ...], error: type[Exception], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error):
        call(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_lies_in_the_runs_folder() -> None:
    result = call("report", "a")
    assert result.exit_code == 0
    path = Path(result.stdout.strip())
    assert path.name == "report.html"
    assert path.parent.name == "a"
    assert "<h1>a</h1>" in path.read_text(encoding="utf-8")


def test_a_report_elsewhere() -> None:
    assert call("report", "a", "--out", "deep/a.html").stdout.strip() == "deep/a.html"
    assert Path("deep/a.html").is_file()


def test_a_report_as_data_writes_a_page_only_where_it_is_told(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert document("report", "a")["name"] == "a"
    assert sorted(tmp_path.rglob("*")) == before
    assert document("report", "a", "--out", "a.html")["name"] == "a"
    assert Path("a.html").is_file()


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("plotext", ("plot", "a")),
        ("matplotlib", ("plot", "a", "--png", "a.png")),
        ("matplotlib", ("plot", "a", "--html", "a.html")),
        ("jinja2", ("plot", "a", "--html", "a.html")),
        ("matplotlib", ("report", "a")),
        ("jinja2", ("report", "a")),
    ],
)
def test_a_missing_package_is_told(missing: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "installed", lambda package: package != missing)
    with pytest.raises(EnvironmentNotReady, match=f"{missing} is not installed") as caught:
        call(*arguments)
    assert caught.value.hint == software.install_extra("plot")


@pytest.mark.parametrize("arguments", [("plot", "a"), ("report", "a")])
def test_data_needs_no_plotting_package(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "installed", lambda _: False)
    assert document(*arguments)


def test_help_tells_the_defaults_that_there_are() -> None:
    parameters = inspect.signature(commands.plot).parameters
    assert parameters["smooth"].default == SMOOTHING
    assert ", ".join(DEFAULTS) in str(parameters["metric"].annotation)
