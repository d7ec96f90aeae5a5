"""What is wrong with the points of a sweep, each thing told once, with the values that it goes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from flashrl_cli.errors import FlashrlError, InputError, Problem
from flashrl_cli.launch.sweep.points import FLAGS

if TYPE_CHECKING:
    from flashrl_cli.launch.sweep.points import Point

T = TypeVar("T")
TOLD = 3
"""Points that a problem names, where they share no value."""


class Complaints:
    """Collects the problems of single points, from errors of one kind, and tells them as those of the whole."""

    def __init__(self, points: Sequence[Point], kind: type[FlashrlError] = InputError) -> None:
        self.points, self.kind = points, kind
        self.readable = points
        """Those that can have problems of a later kind."""
        self._found: dict[Problem, list[Point]] = {}

    def collect(self, point: Point, call: Callable[[], T]) -> T | None:
        """Result of `call`, or None after an error of its kind, whose problems are noted as the point's."""
        try:
            return call()
        except self.kind as error:
            for problem in error.problems or (Problem(error.message, None, error.hint),):
                self.note(point, problem)
        return None

    def note(self, point: Point, problem: Problem) -> None:
        """Keep one problem of one point."""
        self._found.setdefault(_as_sweep(problem, point), []).append(point)

    def problems(self) -> list[Problem]:
        """Every problem once."""
        return [self._told(problem, points) for problem, points in self._found.items()]

    def _told(self, problem: Problem, points: Sequence[Point]) -> Problem:
        if set(points) in (set(self.points), set(self.readable)):
            return problem
        for key, text in points[0].values:
            if any(set(points) == _having(key, text, among) for among in (self.points, self.readable)):
                if problem.where == f"--sweep {key}":
                    return replace(problem, where=f"--sweep {key}={text}")
                return replace(problem, message=f"{problem.message} (with {key}={text})")
        told = "; ".join(map(str, points[:TOLD]))
        more = f" and {len(points) - TOLD} more" if len(points) > TOLD else ""
        return replace(problem, message=f"{problem.message} (at {told}{more})")


def _having(key: str, text: str, points: Sequence[Point]) -> set[Point]:
    return {point for point in points if (key, text) in point.values}


def _as_sweep(problem: Problem, point: Point) -> Problem:
    """A problem of one run's options as one of `--sweep`, where the point gave the option."""
    where, hint = problem.where or "", problem.hint
    for key, _ in point.values:
        option = f"--{key}" if key in FLAGS else f"--set {key}"
        where = f"--sweep {key}" if where == option else where
        for said in (f"--set {key}=", f"--set '{key}=", f"mean --{key} "):
            hint = hint and hint.replace(said, said.replace(option, f"--sweep {key}").replace(f"{key} ", f"{key}="))
    return Problem(problem.message, where or None, hint)
