"""What must hold between the values of a spec. A rule yields findings; nothing here knows of verl.

Add a rule: write a generator over RunSpec, list it in RULES. What verl itself demands is judged in `verl.demands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from flashrl_cli.config.spec import RunSpec
from flashrl_cli.secrets import looks_secret
from flashrl_cli.text import counted


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
            "algorithm.mini_batch_size",
            f"{mini} is more than data.train_batch_size = {batch}",
            f"--set algorithm.mini_batch_size={batch}",
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


def filtered_groups_vary(spec: RunSpec) -> Iterator[Finding]:
    """A group of one has no spread: nothing would ever be filtered (GRPO says more, above)."""
    if spec.algorithm.filter_groups.enable and spec.rollout.n == 1 and spec.algorithm.advantage != "grpo":
        yield Finding(
            "algorithm.filter_groups.enable",
            "filters nothing with one response a prompt",
            "--set rollout.n=8, or --set algorithm.filter_groups.enable=false",
        )


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
            f"--set reward.overlong.buffer_len={longest}",
        )


def dual_clip_bounds_from_above(spec: RunSpec) -> Iterator[Finding]:
    """Dual clip bounds the loss of ratios above 1 (arXiv 1912.09729, eq. 5); verl asserts it in the first update."""
    if spec.algorithm.clip_c <= 1:
        yield Finding("algorithm.clip_c", f"{spec.algorithm.clip_c:g} is not above 1", "--set algorithm.clip_c=3.0")


def warmup_ends(spec: RunSpec) -> Iterator[Finding]:
    """In the warm-up the policy does not learn: it needs a critic that does, and an end within the run."""
    warmup, steps = spec.trainer.critic_warmup, spec.trainer.steps
    if warmup and spec.algorithm.advantage != "gae":
        yield Finding(
            "trainer.critic_warmup",
            f"nothing learns in the first {counted(warmup, 'step')}: {spec.algorithm.advantage} has no critic",
            "--set trainer.critic_warmup=0",
        )
    elif steps is not None and warmup > steps:
        yield Finding(
            "trainer.critic_warmup",
            f"the policy never learns: {warmup} is more than trainer.steps = {steps}",
            f"--set trainer.critic_warmup={steps // 10}",
        )


def engine_holds_a_sequence(spec: RunSpec) -> Iterator[Finding]:
    """The engine ends a response where its longest sequence ends, without a word."""
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    held = spec.rollout.max_model_len
    if held is not None and held < longest:
        yield Finding(
            "rollout.max_model_len",
            f"{held} is less than data.max_prompt_length + data.max_response_length = {longest}",
            f"--set rollout.max_model_len={longest}",
        )


def engine_batches_its_sequences(spec: RunSpec) -> Iterator[Finding]:
    """A decoding step takes a token of every running sequence (vLLM refuses less: vllm/config/scheduler.py:263)."""
    tokens, sequences = spec.rollout.max_num_batched_tokens, spec.rollout.max_num_seqs
    if tokens < sequences:
        yield Finding(
            "rollout.max_num_batched_tokens",
            f"{tokens} is less than rollout.max_num_seqs = {sequences}",
            f"--set rollout.max_num_seqs={tokens}",
        )


def mix_has_two_precisions(spec: RunSpec) -> Iterator[Finding]:
    """Some replicas in bf16 and the others in 8 bits, by methods that know their replica: fp8-block's does not."""
    precision = spec.rollout.precision
    if spec.rollout.mix and precision == "bf16":
        yield Finding("rollout.mix", "every replica is in bf16 already", "--set rollout.precision=int8")
    if spec.rollout.mix and precision == "fp8-block":
        yield Finding("rollout.mix", "fp8-block is for all replicas alike", "--set rollout.precision=fp8")


def logits_are_proven(spec: RunSpec) -> Iterator[Finding]:
    """Who computes logits in float32 proves it at a refit, which fp8-block has of its own."""
    if spec.rollout.lm_head_fp32 and spec.rollout.precision == "fp8-block":
        yield Finding("rollout.lm_head_fp32", "fp8-block rollouts do not know it", "--set rollout.precision=fp8")


def cache_in_8_bits_has_scales(spec: RunSpec) -> Iterator[Finding]:
    """The scales of an FP8 cache come with flashrl's weight update (plugins/kv_scales.py), which fp8-block does not take."""
    if spec.rollout.kv_cache != "auto" and spec.rollout.precision == "fp8-block":
        yield Finding(
            "rollout.kv_cache",
            f"{spec.rollout.kv_cache} needs flashrl's own weight update, and fp8-block has verl's",
            "--rollout fp8, or --set rollout.kv_cache=auto",
        )


def profile_is_applied(spec: RunSpec) -> Iterator[Finding]:
    """Smoothing changes nothing but what is lost in quantizing, and verl's own weight update knows none."""
    precision = spec.rollout.precision
    if spec.rollout.profile is None or precision in {"int8", "fp8"}:
        return
    why = (
        "quantize nothing that it could smooth"
        if precision == "bf16"
        else "take verl's own weight update, which smooths nothing"
    )
    yield Finding("rollout.profile", f"{precision} rollouts {why}", "--rollout int8, or --set rollout.profile=null")


def no_secret_is_written_down(spec: RunSpec) -> Iterator[Finding]:
    """A preset is shared, and a plan is kept with the run: neither is a place for what lets somebody in."""
    named = {f"env.{name}": (name, value) for name, value in spec.env.items()}
    # among verl's keys only a variable's name can be told by its capitals from one like `pad_token`
    last = {key: key.rpartition(".")[2] for key in spec.verl}
    named |= {f"verl.{key}": (last[key] if last[key].isupper() else "", str(spec.verl[key] or "")) for key in last}
    for key, (name, value) in named.items():
        if looks_secret(name, value):
            yield Finding(
                key,
                "looks like a secret, and would be written into plans and records",
                f"export {name or 'it'} in the shell that starts flashrl, and leave it out here",
            )


RULES: tuple[Rule, ...] = (
    mini_batch_divides_batch,
    group_has_members,
    filtered_groups_vary,
    metrics_are_written,
    overlong_fits,
    dual_clip_bounds_from_above,
    warmup_ends,
    engine_holds_a_sequence,
    engine_batches_its_sequences,
    mix_has_two_precisions,
    logits_are_proven,
    cache_in_8_bits_has_scales,
    profile_is_applied,
    no_secret_is_written_down,
)


def findings(spec: RunSpec) -> Iterator[Finding]:
    """Yield what every rule finds."""
    for rule in RULES:
        yield from rule(spec)
