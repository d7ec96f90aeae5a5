"""Hints to keys of verl's, with and without verl."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.verl import compose as tree
from flashrl_cli.verl.dead_keys import DEAD_KEYS
from flashrl_cli.verl.lint import keys
from flashrl_cli.verl.lint.keys import OWNED


@pytest.fixture
def no_verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def compose(_: object) -> dict[str, object]:
        raise EnvironmentNotReady("no verl")

    monkeypatch.setattr(tree, "compose", compose)
    keys._living.cache_clear()
    yield
    keys._living.cache_clear()


@pytest.fixture
def small_verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tree, "compose", lambda _: {"ray_kwargs": {"timeline": None}, "data": {"shuffle": True}})
    keys._living.cache_clear()
    yield
    keys._living.cache_clear()


@pytest.mark.usefixtures("no_verl")
def test_what_is_known_without_verl():
    assert all(OWNED[key] in found.hint for key in OWNED if (found := keys.translation(key)))
    assert all(dead.instead in found.hint for dead in DEAD_KEYS if (found := keys.translation(dead.key)))
    assert all(keys.translation(key) for key in [*OWNED, *(dead.key for dead in DEAD_KEYS)])
    assert keys.translation("data.shuffle") is None
    assert keys.translation("foo") is None


@pytest.mark.usefixtures("small_verl")
@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("data.shuffle", "keys of verl's own go under verl: --set verl.data.shuffle=…"),
        ("+data.shuffle", "keys of verl's own go under verl: --set verl.data.shuffle=…"),
        ("++verl.data.shuffle", "keys of verl's own go under verl: --set verl.data.shuffle=…"),
        ("+data.new", "--set verl.+data.new=… adds a key that verl's own tree lacks"),
        ("++trainer.nnodes", f"flashrl's way to set it: {OWNED['trainer.nnodes']}"),
        ("ray_kwarg.timeline", "did you mean verl's ray_kwargs.timeline? keys of verl's own go under verl: "),
        ("data.shufle", None),  # may as well be a misspelled key of flashrl's
        ("foo", None),
    ],
)
def test_translation(key, hint):
    found = keys.translation(key)
    assert (found is None) if hint is None else (found is not None and found.hint.startswith(hint))
