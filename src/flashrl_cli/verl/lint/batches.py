"""Rules on how a step's responses are split over processes and forward passes.

They concern divisibility, micro-batches and token budgets. verl checks a part of this when it starts, and the rest by
assertions in a worker, in the first step or at the first long response. Cited lines are verl 0.9.1's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashrl_cli.verl.config import (
    CRITIC,
    LOG_PROBS,
    REFERENCE,
    UPDATE,
    Pass,
    Rule,
    Settings,
    largest_divisor,
    written,
)
from flashrl_cli.verl.overrides import ACTOR, ROLLOUT, SEPARATE

if TYPE_CHECKING:
    from flashrl_cli.errors import Problem


def micro_batch_is_given(s: Settings) -> Iterator[Problem]:
    """Without dynamic batches each pass needs a micro-batch size.

    verl refuses a configuration without one (workers/config/actor.py:207, utils/config.py:155). V1's workers read only
    the size per device (workers/engine_workers.py:636).
    """
    for step in _fixed(s):
        sizes = [s.get(step.micro)]
        if step is REFERENCE and (s.get(REFERENCE.dynamic) or s.has_adapter):
            sizes.append(s.get(step.whole_micro))
        if all(size is None for size in sizes):
            yield s.problem(
                f"{written(step.micro)} is not set, and the {step.name} does not batch by tokens",
                s.fix(step.micro, _fitting_micro(s, step)),
                step.micro,
                step.dynamic,
                written(step.tokens),
                f"{ACTOR}.use_kl_loss" if s.spec.algorithm.kl_loss else "algorithm.use_kl_in_reward",
            )


def micro_batch_is_given_once(s: Settings) -> Iterator[Problem]:
    """verl refuses both sizes of a pass together (utils/config.py:158, workers/config/actor.py:202, critic.py:154)."""
    for step in _fixed(s):
        if s.get(step.micro) is not None and s.get(step.whole_micro) is not None:
            yield s.problem(
                f"{written(step.whole_micro)} and {written(step.micro)} say the same twice",
                f"drop verl.{step.whole_micro}",
                step.whole_micro,
            )


def _fixed(s: Settings) -> Iterator[Pass]:
    """Yield the passes that need a micro-batch size; the reference policy's does whenever the policy's is fixed."""
    if not s.get(UPDATE.dynamic):
        yield from (UPDATE, LOG_PROBS)
    if s.has_reference and not (s.get(UPDATE.dynamic) and (s.get(REFERENCE.dynamic) or s.has_adapter)):
        yield REFERENCE


def mini_batch_fills_processes(s: Settings) -> Iterator[Problem]:
    """Each process takes an equal share of a mini-batch.

    verl asserts it in the first update (workers/engine_workers.py:267).
    """
    for role, key in (("actor", f"{ACTOR}.ppo_mini_batch_size"), ("critic", "critic.ppo_mini_batch_size")):
        mini, shares, n = s.size(key), s.data_parallel(role), s.spec.rollout.n
        if (role == "critic" and not s.has_critic) or not mini or not shares or mini * n % shares == 0:
            continue
        if role == "critic" and mini == s.spec.algorithm.mini_batch_size and shares == s.data_parallel("actor"):
            continue  # the same numbers as the policy's mini-batch, which is reported already
        yield s.problem(
            f"{written(key)} = {mini} prompts x {n} responses do not split over {shares} data-parallel processes",
            _fitting_mini(s, key, mini, shares),
            key,
            f"{ACTOR}.ppo_mini_batch_size",
            f"{ROLLOUT}.n",
            "trainer.n_gpus_per_node",
        )


def _fitting_mini(s: Settings, key: str, mini: int, shares: int) -> str:
    """Option for the nearest mini-batch that splits evenly and divides the batch, or for a batch that has one."""
    batch, step = s.spec.data.train_batch_size, shares // math.gcd(shares, s.spec.rollout.n)
    fitting = [size for size in range(step, batch + 1, step) if batch % size == 0]
    if fitting:
        return s.fix(key, min(fitting, key=lambda size: abs(size - mini)))
    rounded = math.ceil(batch / step) * step
    return " ".join(s.option(name, rounded) for name in ("data.train_batch_size", "algorithm.mini_batch_size"))


def batch_fills_devices(s: Settings) -> Iterator[Problem]:
    """Without dynamic batches the number of a step's responses must be divisible by the number of devices.

    verl checks it even where several devices share a sequence (utils/config.py:124).
    """
    batch, n = s.spec.data.train_batch_size, s.spec.rollout.n
    if not s.get(UPDATE.dynamic) and batch * n % s.devices:
        step = s.devices // math.gcd(s.devices, n)
        yield s.problem(
            f"data.train_batch_size = {batch} prompts x {n} responses do not divide by {s.devices} devices",
            s.option("data.train_batch_size", math.ceil(batch / step) * step),
            "data.train_batch_size",
            f"{ROLLOUT}.n",
            "trainer.n_gpus_per_node",
        )


def micro_batch_divides_share(s: Settings) -> Iterator[Problem]:
    """A fixed micro-batch must divide a process's share: asserted in the first step (workers/engine/utils.py:125)."""
    for step in (UPDATE, LOG_PROBS, *([REFERENCE] if s.has_reference and not s.has_adapter else [])):
        micro, rows = s.size(step.micro), _rows(s, step)
        if s.get(step.dynamic) or not micro or not rows or rows % micro == 0:
            continue
        if step is not UPDATE and s.where(step.micro) is None:
            continue  # it follows the update, for which the problem is reported
        yield s.problem(
            f"{written(step.micro)} = {micro} does not divide the {rows} responses a process gets in the {step.name}",
            s.fix(step.micro, largest_divisor(rows, micro)),
            step.micro,
            f"{ACTOR}.ppo_mini_batch_size",
            f"{ROLLOUT}.n",
            "trainer.n_gpus_per_node",
        )


def _rows(s: Settings, step: Pass) -> int | None:
    """Responses that a process gets in a pass; None where they do not split evenly.

    verl fills a batch up to a multiple of both models' mini-batches (trainer/ppo/v1/trainer_base.py:1589); in mode
    separate_async a batch is one mini-batch (:539).
    """
    shares, n = s.data_parallel(step.role), s.spec.rollout.n
    mini = s.spec.algorithm.mini_batch_size * n
    if not shares or mini % shares:
        return None
    if step is UPDATE:
        return mini // shares
    multiple = math.lcm(mini, (s.size("critic.ppo_mini_batch_size") or 1) * n) if s.has_critic else mini
    sampled = mini if s.spec.trainer.mode == SEPARATE else s.spec.data.train_batch_size * n
    return math.ceil(sampled / multiple) * multiple // shares


def _fitting_micro(s: Settings, step: Pass) -> int:
    rows = _rows(s, step)
    return largest_divisor(rows, min(rows, 8)) if rows else 1


def critic_trains_on_what_is_sampled(s: Settings) -> Iterator[Problem]:
    """In mode separate_async a critic's mini-batch may not be larger than the policy's, which verl samples at once.

    verl would fill each batch up with padding to a multiple of it (trainer/ppo/v1/trainer_base.py:1589).
    """
    key, mini = "critic.ppo_mini_batch_size", s.spec.algorithm.mini_batch_size
    size = s.size(key)
    if s.has_critic and s.spec.trainer.mode == SEPARATE and size and mini % size:
        yield s.problem(
            f"{written(key)} = {size} does not divide algorithm.mini_batch_size = {mini}, of which verl samples one at "
            "a time",
            s.fix(key, largest_divisor(mini, size)),
            key,
            f"{ACTOR}.ppo_mini_batch_size",
        )


def token_budget_holds_a_sequence(s: Settings) -> Iterator[Problem]:
    """A token budget must hold the longest sequence; otherwise the first such sequence ends the run.

    The assertion is in utils/seqlen_balancing.py:384. The critic always batches by tokens: V1 leaves its engine at that
    default (trainer/ppo/v1/trainer_base.py:266).
    """
    for step in (UPDATE, LOG_PROBS, REFERENCE, CRITIC):
        budget = s.token_budget(step)
        if step.role not in s.roles() or budget is None or not s.by_tokens(step):
            continue
        degree = s.sequence_parallel(step.role)
        if budget * degree < s.longest and not _follows_update(s, step):
            shared = f" x {degree} sequence-parallel devices" if degree > 1 else ""
            yield s.problem(
                f"{written(step.tokens)} = {budget} tokens{shared} cannot hold a sequence of {s.longest}",
                s.fix(step.tokens, math.ceil(s.longest / degree)),
                step.tokens,
                "data.max_response_length",
            )


def _follows_update(s: Settings, step: Pass) -> bool:
    """Whether a pass takes its token budget from the update, for which a problem is then reported."""
    same = s.get(UPDATE.dynamic) and s.sequence_parallel(step.role) == s.sequence_parallel("actor")
    return step in (LOG_PROBS, REFERENCE) and bool(same) and s.get(step.tokens) == s.get(UPDATE.tokens)


def prompts_come_in_whole_batches(s: Settings) -> Iterator[Problem]:
    """The prompts of a step must be a whole number of the data loader's batches.

    See trainer/ppo/v1/trainer_base.py:1485; with dynamic sampling, and in asynchronous modes, verl loads prompts one at
    a time (:735).
    """
    loaded, batch = s.size("data.gen_batch_size"), s.spec.data.train_batch_size
    if not loaded:
        return
    if s.spec.trainer.mode != "sync" and loaded != 1:
        yield s.problem(
            f"verl ignores data.gen_batch_size in mode {s.spec.trainer.mode}",
            "drop it; trainer.prefetch says how many batches are sampled ahead",
            "data.gen_batch_size",
        )
    elif s.spec.algorithm.filter_groups.enable and loaded != 1:
        yield s.problem(
            "verl ignores data.gen_batch_size with dynamic sampling",
            "drop it; algorithm.filter_groups.max_inflight_batches bounds the prompts in flight",
            "data.gen_batch_size",
        )
    elif batch % loaded:
        yield s.problem(
            f"data.gen_batch_size = {loaded} does not divide data.train_batch_size = {batch}",
            s.fix("data.gen_batch_size", largest_divisor(batch, loaded)),
            "data.gen_batch_size",
        )


RULES: tuple[Rule, ...] = (
    micro_batch_is_given,
    micro_batch_is_given_once,
    mini_batch_fills_processes,
    batch_fills_devices,
    micro_batch_divides_share,
    critic_trains_on_what_is_sampled,
    token_budget_holds_a_sequence,
    prompts_come_in_whole_batches,
)
