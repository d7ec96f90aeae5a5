"""What must hold between the values of a spec. A rule yields findings; nothing here knows of verl.

Add a rule: write a generator over RunSpec, list it in RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from flashrl_cli.config.spec import RunSpec


class Finding(NamedTuple):
    """A broken rule: the key to look at, what is wrong, and the fix."""

    key: str
    message: str
    hint: str


Rule = Callable[[RunSpec], Iterator[Finding]]


def mini_batch_divides_batch(spec: RunSpec) -> Iterator[Finding]:
    """An optimizer step takes a whole share of the step's prompts."""
    mini, batch = spec.algorithm.mini_batch_size, spec.data.train_batch_size
    if mini > batch:
        yield Finding(
            "algorithm.mini_batch_size", f"{mini} is more than data.train_batch_size = {batch}", f"at most {batch}"
        )
    elif batch % mini:
        fitting = max(n for n in range(1, mini) if batch % n == 0)
        yield Finding(
            "algorithm.mini_batch_size",
            f"{mini} does not divide data.train_batch_size = {batch}",
            f"--set algorithm.mini_batch_size={fitting}",
        )


def group_has_members(spec: RunSpec) -> Iterator[Finding]:
    """GRPO compares responses to one prompt; with a single one every advantage is 0."""
    if spec.algorithm.advantage == "grpo" and spec.rollout.n == 1:
        yield Finding("rollout.n", "GRPO needs more than one response a prompt", "--set rollout.n=8")


def metrics_are_written(spec: RunSpec) -> Iterator[Finding]:
    """The table, the guard and `runs` read verl's file logger."""
    if "file" not in spec.trainer.logger:
        shown = ",".join((*spec.trainer.logger, "file"))
        yield Finding("trainer.logger", "lacks file, which flashrl reads", f"--set 'trainer.logger=[{shown}]'")


def overlong_fits(spec: RunSpec) -> Iterator[Finding]:
    """A penalty needs the manager that applies it and fits into the response (verl asserts so in a worker)."""
    overlong, longest = spec.reward.overlong, spec.data.max_response_length
    if overlong and spec.reward.manager != "dapo":
        yield Finding("reward.overlong", f"manager {spec.reward.manager} does not know it", "--set reward.manager=dapo")
    if overlong and overlong.buffer_len > longest:
        yield Finding(
            "reward.overlong.buffer_len",
            f"{overlong.buffer_len} is more than data.max_response_length = {longest}",
            f"at most {longest}",
        )


RULES: tuple[Rule, ...] = (mini_batch_divides_batch, group_has_members, metrics_are_written, overlong_fits)


def findings(spec: RunSpec) -> Iterator[Finding]:
    """Yield what every rule finds."""
    for rule in RULES:
        yield from rule(spec)
