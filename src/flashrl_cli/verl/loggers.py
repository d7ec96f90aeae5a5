"""What verl's loggers need on the machine that drives a run: a package, and for some a login.

verl constructs them after the models are loaded (verl/utils/tracking.py:62-189), so that a missing one is found minutes into a run.
"""

from __future__ import annotations

import netrc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flashrl_cli.errors import Problem

Login = Callable[[Mapping[str, str], Path], bool]
"""Whether there is a login, from the environment and the home folder."""
WANDB_AWAY = {"offline", "disabled", "dryrun"}
SWANLAB_AWAY = {"local", "offline", "disabled"}
VEMLP = ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION")


@dataclass(frozen=True, slots=True)
class Logger:
    """One of verl's loggers: the module it imports, what installs that, and the login it needs with its command."""

    module: str | None = None
    package: str | None = None
    login: Login | None = None
    how: str | None = None


def wandb_login(environment: Mapping[str, str], home: Path) -> bool:
    """A key or identity token, a line for its host in netrc, or a mode without a server."""
    if environment.get("WANDB_MODE", "").lower() in WANDB_AWAY:
        return True
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    files = (Path(environment["NETRC"]),) if environment.get("NETRC") else (home / ".netrc", home / "_netrc")
    return any(_names(file, host) for file in files)


def swanlab_login(environment: Mapping[str, str], home: Path) -> bool:
    """A key, the file that `swanlab login` writes, or a mode without a server."""
    if environment.get("SWANLAB_MODE", "").lower() in SWANLAB_AWAY or environment.get("SWANLAB_API_KEY"):
        return True
    return (Path(environment.get("SWANLAB_SAVE_DIR") or home / ".swanlab") / ".netrc").is_file()


def clearml_login(environment: Mapping[str, str], home: Path) -> bool:
    """Keys, or the file that `clearml-init` writes."""
    keys = ("CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY")
    file = Path(environment.get("CLEARML_CONFIG_FILE") or home / "clearml.conf")
    return all(environment.get(key) for key in keys) or file.is_file()


def vemlp_login(environment: Mapping[str, str], _: Path) -> bool:
    """The three variables that verl reads (verl/utils/tracking.py:150-152)."""
    return all(environment.get(key) for key in VEMLP)


LOGGERS = {
    "console": Logger(),
    "file": Logger(),
    "wandb": Logger("wandb", "wandb", wandb_login, "`wandb login`, or WANDB_API_KEY, or WANDB_MODE=offline"),
    "tensorboard": Logger("tensorboard", "tensorboard"),
    "mlflow": Logger("mlflow", "mlflow"),
    "swanlab": Logger(
        "swanlab", "swanlab", swanlab_login, "`swanlab login`, or SWANLAB_API_KEY, or SWANLAB_MODE=local"
    ),
    "trackio": Logger("trackio", "trackio"),
    "clearml": Logger("clearml", "clearml", clearml_login, "`clearml-init`"),
    "vemlp_wandb": Logger("volcengine_ml_platform", "volcengine-ml-platform", vemlp_login, f"set {', '.join(VEMLP)}"),
    "rl_insight": Logger("rl_insight", "rl-insight"),
}
"""Names that verl 0.9.1 knows (verl/utils/tracking.py:49-60) and what each needs."""


def problems(
    names: Sequence[str], environment: Mapping[str, str], installed: Callable[[str], bool], home: Path
) -> Iterator[Problem]:
    """Yield what keeps each of a run's loggers from starting; `installed` answers for a module's name."""
    for name in names:
        logger = LOGGERS.get(name)
        if logger is None:
            yield Problem(f"verl has no logger {name}", where=name, hint=f"one of {', '.join(LOGGERS)}")
        elif logger.module and not installed(logger.module):
            yield Problem(
                f"the package {logger.package} is not installed", where=name, hint=f"`pip install {logger.package}`"
            )
        elif logger.login and not logger.login(environment, home):
            yield Problem("not logged in", where=name, hint=logger.how)


def demanding(names: Sequence[str]) -> Iterator[str]:
    """Yield those of the names that need more than verl itself."""
    for name in names:
        if name in LOGGERS and LOGGERS[name].module:
            yield name


def _names(file: Path, host: str) -> bool:
    """Whether a netrc file has a login for a host."""
    try:
        return host in netrc.netrc(file).hosts
    except (OSError, netrc.NetrcParseError):
        return False
