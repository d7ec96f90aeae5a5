"""How long verl's trainer pauses before it asks for finished responses again."""

from __future__ import annotations

from flashrl_cli.plugins.sampler import pause


def test_pauses_grow_with_the_wait_between_their_bounds() -> None:
    assert [pause(waited, 2.0) for waited in (0.0, 1.0, 10.0, 25.0, 1000.0)] == [0.05, 0.05, 0.4, 1.0, 2.0]
    assert pause(0.0, 0.01) == 0.01
