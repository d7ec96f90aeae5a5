"""What verl's loggers need, found before a launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrl_cli.errors import Problem
from flashrl_cli.verl import environment as loggers


def problems(
    name: str, home: Path, environment: dict[str, str] | None = None, *, installed: bool = True
) -> list[Problem]:
    return list(loggers.problems([name], environment or {}, lambda _: installed, home))


@pytest.mark.parametrize("name", ["console", "file"])
def test_verl_s_own_need_nothing(name: str, tmp_path: Path) -> None:
    assert not problems(name, tmp_path, installed=False)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio", "rl_insight"])
def test_a_package_is_enough(name: str, tmp_path: Path) -> None:
    assert not problems(name, tmp_path)
    (problem,) = problems(name, tmp_path, installed=False)
    assert problem.hint == f"`pip install {name.replace('_', '-')}`"


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("wandb", {"WANDB_API_KEY": "k"}),
        ("wandb", {"WANDB_MODE": "offline"}),
        ("wandb", {"WANDB_MODE": "disabled"}),
        ("wandb", {"WANDB_IDENTITY_TOKEN_FILE": "/t"}),
        ("swanlab", {"SWANLAB_API_KEY": "k"}),
        ("swanlab", {"SWANLAB_MODE": "local"}),
        ("swanlab", {"SWANLAB_MODE": "disabled"}),
        ("clearml", {"CLEARML_API_ACCESS_KEY": "a", "CLEARML_API_SECRET_KEY": "b"}),
        ("vemlp_wandb", dict.fromkeys(loggers.VEMLP, "x")),
    ],
)
def test_logins_from_the_environment(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    assert not problems(name, tmp_path, environment)
    (problem,) = problems(name, tmp_path, dict.fromkeys(environment, ""))
    assert problem == Problem("not logged in", name, loggers.LOGGERS[name].how)


def test_a_package_comes_before_its_login(tmp_path: Path) -> None:
    (problem,) = problems("wandb", tmp_path, installed=False)
    assert problem == Problem("the package wandb is not installed", "wandb", "`pip install wandb`")


@pytest.mark.parametrize("mode", ["online", "shared", "x"])
def test_other_modes_need_a_login(mode: str, tmp_path: Path) -> None:
    assert problems("wandb", tmp_path, {"WANDB_MODE": mode})
    assert problems("swanlab", tmp_path, {"SWANLAB_MODE": mode})


@pytest.mark.parametrize(
    ("text", "environment", "logged_in"),
    [
        ("machine api.wandb.ai login user password k\n", {}, True),
        ("machine elsewhere login user password k\n", {}, False),
        ("machine corp login user password k\n", {"WANDB_BASE_URL": "https://corp:8080"}, True),
        ("machine api.wandb.ai login user password k\n", {"WANDB_BASE_URL": "https://corp"}, False),
        ("nonsense", {}, False),
        ("", {}, False),
    ],
)
def test_wandb_s_netrc(text: str, environment: dict[str, str], logged_in: bool, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(text)
    (tmp_path / ".netrc").chmod(0o600)
    assert (not problems("wandb", tmp_path, environment)) is logged_in


def test_a_netrc_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "logins"
    file.write_text("machine api.wandb.ai login user password k\n")
    file.chmod(0o600)
    assert problems("wandb", tmp_path)
    assert not problems("wandb", tmp_path, {"NETRC": str(file)})


def test_files_of_other_logins(tmp_path: Path) -> None:
    assert problems("swanlab", tmp_path)
    (tmp_path / ".swanlab").mkdir()
    (tmp_path / ".swanlab/.netrc").write_text("")
    assert not problems("swanlab", tmp_path)
    assert problems("clearml", tmp_path)
    (tmp_path / "clearml.conf").write_text("")
    assert not problems("clearml", tmp_path)


def test_an_unknown_logger(tmp_path: Path) -> None:
    (problem,) = problems("weights", tmp_path)
    assert problem.message == "verl has no logger weights"
    assert "wandb" in str(problem.hint)


def test_every_problem_is_told(tmp_path: Path) -> None:
    found = loggers.problems(("console", "wandb", "nope", "swanlab"), {}, lambda _: True, tmp_path)
    assert [problem.where for problem in found] == ["wandb", "nope", "swanlab"]


def test_demanding() -> None:
    assert list(loggers.demanding(("console", "file", "wandb", "nope", "trackio"))) == ["wandb", "trackio"]
