"""Values that follow from others unless they are set."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flashrl_cli.config.spec import RunSpec


class Derived(NamedTuple):
    """A value for a key that is null, and why."""

    key: str
    value: int | str
    reason: str


def derived_values(spec: RunSpec) -> Iterator[Derived]:
    """Yield the values that follow."""
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    if spec.rollout.max_model_len is None:
        yield Derived("rollout.max_model_len", longest, "data.max_prompt_length + data.max_response_length")
    if spec.algorithm.advantage == "gae":
        yield from _critic_values(spec, longest)


def _critic_values(spec: RunSpec, longest: int) -> Iterator[Derived]:
    critic = spec.critic
    if critic.path is None:
        yield Derived("critic.path", spec.model.path, "model.path")
    if critic.max_tokens_per_gpu is None and critic.micro_batch_size_per_gpu is not None:
        tokens = critic.micro_batch_size_per_gpu * longest
        yield Derived("critic.max_tokens_per_gpu", tokens, "critic.micro_batch_size_per_gpu full-length responses")
