"""A launch plan as text for people: one shell script that says everything and can be copied and run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from flashrl_cli.launch.ray import plan as ray_plan
from flashrl_cli.verl.themes import by_theme

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flashrl_cli.launch.plan import LaunchPlan
    from flashrl_cli.launch.ray.plan import Job


def plan_script(plan: LaunchPlan, remarks: Sequence[str] = (), *, job: Job | None = None) -> str:
    """The plan as a POSIX shell script: the overrides by theme, the environment, the files; `remarks` stand on top.

    With a `job`, it submits that one. It runs what a launch runs, less the watching; overrides stand in another order, which
    means nothing to Hydra.
    """
    attempt = plan.attempt_paths
    lines = [
        "#!/bin/sh",
        *_comments(_head(plan)),
        *_comments(remarks),
        "set -eu",
        *([] if job else _environment(plan)),
        *_arguments(plan),
        "",
        *_comments([f"log: {attempt.log}", f"metrics: {attempt.metrics}", f"checkpoints: {plan.paths.checkpoints}"]),
        f"mkdir -p {shlex.quote(str(attempt.plugins))}",
        *(ray_plan.script(plan, job) if job else _execution(plan)),
    ]
    return "\n".join(lines) + "\n"


def _environment(plan: LaunchPlan) -> Iterator[str]:
    yield from ("", "# environment")
    yield from (f"export {key}={shlex.quote(value)}" for key, value in plan.env.items())


def _execution(plan: LaunchPlan) -> Iterator[str]:
    yield f"cd {shlex.quote(str(plan.cwd))}"
    yield f'exec {shlex.join(plan.argv[:3])} "$@"'


def _head(plan: LaunchPlan) -> Iterator[str]:
    spec = plan.spec
    yield f"flashrl preset {plan.preset}, run {plan.name}, attempt {plan.attempt}"
    cap = spec.correction.cap
    correction = f"truncated importance sampling at {cap:g}" if cap is not None else "no importance sampling"
    yield f"{spec.model.path}, {spec.algorithm.advantage}, {spec.rollout.precision} rollouts, {correction}"


def _comments(texts: Sequence[str] | Iterator[str]) -> Iterator[str]:
    for text in texts:
        yield from (f"# {line}" for line in text.split("\n"))


def _arguments(plan: LaunchPlan) -> Iterator[str]:
    groups = {theme: [str(override) for override in group] for theme, group in by_theme(plan.overrides).items()}
    groups["Hydra"] = list(plan.argv[3 + len(plan.overrides) :])
    start = "set --"
    for theme, words in groups.items():
        yield from ("", f"# {theme}")
        yield " \\\n  ".join([start, *map(_quoted, words)])
        start = 'set -- "$@"'


def _quoted(word: str) -> str:
    """As `shlex.quote`, but readable where Hydra's own quotes are in `word`."""
    return f'"{word}"' if "'" in word and not set(word) & set('$`"\\!') else shlex.quote(word)
