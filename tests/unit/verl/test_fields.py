"""Dataclasses read from source: a small package stands in for verl."""

from __future__ import annotations

import pytest

from flashrl_cli.config.layers import Origin
from flashrl_cli.errors import Location, Problem
from flashrl_cli.verl import compose
from flashrl_cli.verl.lint import keys
from flashrl_cli.verl.overrides import Override

FILES = {
    "base.py": "@dataclass\nclass Base(Mapping):\n    _target_: str = ''\n",
    "config/__init__.py": "from . import actor\nfrom .actor import *\nfrom .optim import OptimConfig as Optim\n",
    "config/actor.py": """
from typing import Optional
from verl.base import Base
from .optim import OptimConfig, Plain
from torch import Tensor
@dataclass
class ActorConfig(Base):
    lr: float = 1.0
    optim: Optional[OptimConfig] = None
    other: OptimConfig | None = None
    extra: dict[str, OptimConfig] = field(default_factory=dict)
    plain: Plain = None
    tensor: Tensor = None
@dataclass(frozen=True)
class FSDPActorConfig(ActorConfig):
    fsdp_size: int = -1
""",
    "config/optim.py": """
from ..base import Base
class Plain:
    x: int
@dataclass
class OptimConfig(Base):
    momentum: float = 0.9
""",
}
CACHES = (keys.find, keys._body, keys._text, keys._file, keys._root)


class Tree(compose.Tree):
    """`get` of a flat map."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def get(self, key: str) -> str | None:
        return self.values.get(key)


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    for name, text in FILES.items():
        file = tmp_path / "verl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(compose, "config_folder", lambda: tmp_path / "verl/trainer/config")
    for function in CACHES:
        function.cache_clear()
    yield
    for function in CACHES:
        function.cache_clear()


def found(key: str, *, added: bool = True, target: str = "verl.config.FSDPActorConfig") -> list[Problem]:
    override = Override(key, 1, Origin("set", Location("--set", key=f"verl.+{key}")), added)
    return keys.added_key_problems([override], Tree(**{"a.actor._target_": target}))


@pytest.mark.parametrize(
    "key",
    [
        "a.actor.fsdp_size",
        "a.actor.lr",
        "a.actor._target_",
        "a.actor.optim.momentum",
        "a.actor.other.momentum",
        "a.actor.extra.anything.goes",
        "a.actor.plain.anything",
        "a.actor.tensor.anything",
        "a.actor.lr.deeper",
        "a.b.c",
        "top",
    ],
)
def test_accepted(key):
    assert found(key) == []


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        (
            "a.actor.fsdp_sizes",
            "verl's FSDPActorConfig has no fsdp_sizes",
            "did you mean a.actor.fsdp_size? (its fields: verl/config/actor.py:15)",
        ),
        ("a.actor.momentum", "verl's FSDPActorConfig has no momentum", "its fields: verl/config/actor.py:15"),
        (
            "a.actor.optim.momentun",
            "verl's OptimConfig has no momentun",
            "did you mean a.actor.optim.momentum? (its fields: verl/config/optim.py:6)",
        ),
        ("a.actor.other.x.y", "verl's OptimConfig has no x", "its fields: verl/config/optim.py:6"),
    ],
)
def test_refused(key, message, hint):
    (problem,) = found(key)
    assert (problem.message, str(problem.where), problem.hint) == (message, f"--set verl.+{key}", hint)


def test_only_added_keys_are_judged_and_nothing_is_read_without():
    assert found("a.actor.nonsense", added=False) == []
    assert keys._text.cache_info().currsize == 0


@pytest.mark.parametrize("target", ["torch.nn.Linear", "verl.config.Missing", "verl.missing.ActorConfig", "Bare"])
def test_a_class_that_is_not_found_takes_any_name(target):
    assert found("a.actor.nonsense", target=target) == []


def test_an_import_under_another_name():
    optim = keys.find("verl.config", "Optim")
    assert optim
    assert list(optim.fields) == ["_target_", "momentum"]
