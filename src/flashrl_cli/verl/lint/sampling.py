"""Rules on sampling: a response's log-probs must be those of the distribution from which it was sampled.

An importance weight w = p_trainer / p_rollout has mean 1 over sampled tokens if and only if p_rollout is the
distribution that the engine sampled from, and that distribution excludes no token which the trainer's includes. Where
top-k or top-p exclude tokens, both must be normalized over the same ones: over all (raw log-probs, where the mean is
the ratio of two kept masses) or over the kept ones (`correction.support`, plugins/support.py). Cited lines are verl
0.9.1's, and vLLM 0.28's where vllm/ is named.

In V1 a training request sets temperature, top_p, top_k, repetition_penalty 1 and ignore_eos, and nothing else
(trainer/ppo/v1/agent_loop_tq.py:64, workers/rollout/vllm_rollout/vllm_async_server.py:622-634). No key sets min_p,
other penalties, bad words, stop strings, a bias or a grammar, and of a model folder's generation_config.json only the
stop tokens are used (vllm/sampling_params.py:656).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract
from flashrl_cli.verl.config import written
from flashrl_cli.verl.overrides import (
    ENGINE,
    EXTERNAL_LIB,
    LOG_PROBS_MODE,
    MAX_LOG_PROBS,
    MODEL,
    PROCESSED,
    RAW,
    ROLLOUT,
    takes_raw_log_probs,
)

if TYPE_CHECKING:
    from flashrl_cli.errors import Problem
    from flashrl_cli.verl.config import Rule, Settings

TEMPERATURE, TOP_P, TOP_K = f"{ROLLOUT}.temperature", f"{ROLLOUT}.top_p", f"{ROLLOUT}.top_k"
MODE, LOG_PROBS = LOG_PROBS_MODE, f"{ROLLOUT}.calculate_log_probs"
SUPPORT, AGENT_LOOP = "correction.support", f"{ROLLOUT}.agent.default_agent_loop"
LEAST_TEMPERATURE = 0.01
"""Lowest temperature above 0 at which vLLM samples; it raises lower ones to it (vllm/sampling_params.py:28, 476)."""
WEIGHTED = {
    "tis": "truncated importance sampling",
    "icepop": "IcePop's importance weights",
    "seq-tis": "importance weights of responses",
}
"""Names of the kinds of weights in messages."""
OF_A_REQUEST = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n",
        "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "detokenize",
        "skip_special_tokens", "include_stop_str_in_output", "structured_outputs", "bad_words", "logit_bias",
        "allowed_token_ids", "thinking_token_budget",
    }
)  # fmt: skip
"""Options of a request to vLLM (vllm/sampling_params.py); none of them is an argument of vLLM's server."""
DRAFTS = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""Arguments of vLLM's server that switch speculative decoding on (vllm/engine/arg_utils.py:642, 1619)."""


def weights_see_what_was_sampled(s: Settings) -> Iterator[Problem]:
    """With top-p or top-k, E[w] is the kept probability mass, not 1: only vLLM's log-probs reflect the truncation.

    vllm/v1/sample/ops/topk_topp_sampler.py normalizes over the kept tokens,
    workers/engine/fsdp/transformer_impl.py:1386 over all tokens. Rejection (trainer/ppo/rollout_corr_helper.py:849)
    uses the same ratio of probabilities. Raw log-probs, which vLLM takes before the temperature, are over all tokens as
    the trainer's are.
    """
    reader = _reader(s)
    if reader is None or s.get(MODE) != PROCESSED or s.spec.correction.support == "kept":
        return
    for key, off in _truncations(s):
        yield s.problem(
            f"{written(key)} = {s.get(key)} with {reader}: vLLM's log-probs are renormalized over the kept tokens and"
            " the trainer's are not, so that every importance weight is off by the kept mass",
            f"{s.fix(key, off)}, {_comparable(s)}, or {_without(s)} (validation may truncate:"
            f" verl.{ROLLOUT}.val_kwargs)",
            key,
        )


def kept_tokens_are_known(s: Settings) -> Iterator[Problem]:
    """Log-probs over the kept tokens need a bounded number of tokens, and the code that carries them to the trainer.

    The engine returns the tokens as its most probable ones, and only top-k bounds their number. verl carries token ids
    for each position of a response (experimental/agent_loop/agent_loop.py:153); see plugins/support.py for the rest.
    """
    if s.spec.correction.support != "kept":
        return
    full = s.option(SUPPORT, "full")
    idle = "" if _reader(s) else "nothing compares log-probs"
    idle = idle or ("" if dict(_truncations(s)) else "neither rollout.top_k nor rollout.top_p excludes a token")
    if idle:
        yield s.problem(f"{SUPPORT} = kept, and {idle}", full, SUPPORT)
        return
    top_k, most = s.spec.rollout.top_k, _most_kept(s)
    if not 1 < top_k <= most:
        why = "a response's token may have any number of others beside it" if top_k < 1 else f"rollout.top_k = {top_k}"
        yield s.problem(
            f"{SUPPORT} = kept takes rollout.top_k of 2 to {most} (with rollout.top_p or without): {why}",
            f"{s.fix(TOP_K, most)}, or {full}",
            TOP_K,
            SUPPORT,
        )
    for key, needed, why in (
        (MAX_LOG_PROBS, contract.kept_columns(contract.MOST_KEPT), "the kept tokens are asked for as log-probs"),
        (MODE, PROCESSED, "the engine's log-probs must be over the kept tokens, too"),
        (EXTERNAL_LIB, contract.SUPPORT, "that is where flashrl changes verl for it"),
        (f"{MODEL}.use_fused_kernels", False, "fused kernels compute log-probs over all tokens"),
        (AGENT_LOOP, "single_turn_agent", "other agent loops do not return the tokens of each turn"),
        ("distillation.enabled", False, "verl has one field for the tokens of a position, the teacher's"),
    ):
        if (s.get(key) or False) != needed:
            drop = f"drop {written(key, new=key == MAX_LOG_PROBS)}"
            undo = drop if key in (MAX_LOG_PROBS, EXTERNAL_LIB) else s.fix(key, needed)
            yield s.problem(f"{written(key)} = {s.get(key)} with {SUPPORT} = kept: {why}", undo, key)


def log_probs_are_of_the_samples(s: Settings) -> Iterator[Problem]:
    """The rollout's log-probs must be those after the temperature, by which the trainer divides its logits.

    vLLM takes raw log-probs before the temperature (vllm/v1/sample/sampler.py:88), and raw is its default mode
    (vllm/config/model.py:250). Its modes for logits return values that verl would compare as if they were log-probs
    (trainer/ppo/rollout_corr_helper.py:941).
    """
    mode = s.get(MODE) or RAW
    if not s.get(LOG_PROBS) or mode == PROCESSED:
        return
    if mode != RAW:
        why = "are no log-probs, which rollout and trainer are compared by"
    elif s.spec.rollout.temperature != 1:
        why = f"are taken before rollout.temperature = {s.spec.rollout.temperature:g}, by which the trainer divides"
    else:
        return
    yield s.problem(f"verl.{MODE} = {s.get(MODE)}: they {why}", s.fix(MODE, PROCESSED), MODE, TEMPERATURE)


def temperature_is_the_engines(s: Settings) -> Iterator[Problem]:
    """vLLM samples at a temperature of at least 0.01, but the trainer divides by the configured one.

    See vllm/sampling_params.py:476 and trainer/ppo/v1/trainer_base.py:1655.
    """
    asked = s.spec.rollout.temperature
    if asked < LEAST_TEMPERATURE:
        yield s.problem(
            f"vLLM would sample at {LEAST_TEMPERATURE} and the trainer divide by rollout.temperature = {asked:g}",
            s.fix(TEMPERATURE, LEAST_TEMPERATURE),
            TEMPERATURE,
        )


def requests_are_not_engine_arguments(s: Settings) -> Iterator[Problem]:
    """vLLM's server fails at an unknown argument, minutes after the start of the run.

    See workers/rollout/vllm_rollout/vllm_async_server.py:470.
    """
    given = s.get(ENGINE) or {}
    for name in sorted(OF_A_REQUEST & given.keys()):
        key, typed = f"{ENGINE}.{name}", f"{ROLLOUT}.{name}"
        is_typed = typed in (TEMPERATURE, TOP_P, TOP_K)
        yield s.problem(
            f"{name} is an option of a request, not of vLLM's engine, and verl passes no other than its own",
            f"{s.fix(typed, given[name])} instead" if is_typed else f"drop verl.+{key}",
            *_written(s, key),
        )


def logits_are_not_processed(s: Settings) -> Iterator[Problem]:
    """A logits processor may exclude tokens before vLLM takes log-probs, and the trainer applies none.

    See vllm/v1/sample/sampler.py:401.
    """
    key, reader = f"{ENGINE}.logits_processors", _reader(s)
    if s.get(key) and reader:
        yield s.problem(
            f"logits processors with {reader}: the trainer's log-probs do not go through them, so that the importance"
            " weights are off by the mass of what they leave out",
            f"drop verl.+{key}, or {_without(s)}",
            key,
        )


def drafts_leave_the_distribution(s: Settings) -> Iterator[Problem]:
    """Under speculative decoding, importance weights have not been shown to have mean 1.

    vLLM assembles the log-probs from target and bonus logits in separate code
    (vllm/v1/sample/rejection_sampler.py:205). With `rejection_sample_method: synthetic` it accepts tokens at a given
    rate (:80), so responses are not sampled from the policy. A draft model would start with dummy weights, which only
    multi-token prediction's refit replaces (workers/rollout/vllm_rollout/utils.py:223).
    """
    drafts, reader = _drafts(s), _reader(s)
    if drafts is None:
        return
    written = [key for name in DRAFTS for key in _written(s, f"{ENGINE}.{name}")]
    drop = f"drop verl.+{written[0]}"
    if drafts.get("rejection_sample_method") == "synthetic":
        yield s.problem(
            "speculative decoding with synthetic acceptance does not sample from the policy", drop, *written
        )
    elif reader:
        yield s.problem(
            f"speculative decoding with {reader}: "
            "that its log-probs are those of what it samples from is not known here",
            f"{drop}, or {_without(s)}",
            *written,
        )


def _written(s: Settings, key: str) -> list[str]:
    """Keys of overrides that are `key` or below it."""
    return [override.key for override in s.overrides if f"{override.key}.".startswith(f"{key}.")]


def _drafts(s: Settings) -> dict[str, Any] | None:
    """vLLM's speculative configuration, given as a map, as JSON or by separate arguments; None if there is none."""
    given = s.get(ENGINE) or {}
    config = given.get(DRAFTS[0])
    if isinstance(config, str):
        with contextlib.suppress(ValueError):
            config = json.loads(config)
    found = dict(config) if isinstance(config, dict) else {}
    short = {"method": "spec_method", "model": "spec_model", "num_speculative_tokens": "spec_tokens"}
    found |= {name: given[flag] for name, flag in short.items() if given.get(flag) is not None}
    return found if found or config else None


def responses_of_a_group_differ(s: Settings) -> Iterator[Problem]:
    """With full determinism every request of a replica has the same seed, so equal prompts get equal responses.

    See workers/rollout/vllm_rollout/vllm_async_server.py:627. V1 gives requests no priority that would distinguish them
    (experimental/agent_loop/single_turn_agent_loop.py:69), so all of them go to the same replica
    (workers/rollout/router.py:193). vLLM's CPU engine fails at the first partial prefill of a request with a seed
    (vllm/v1/worker/gpu_model_runner.py:3825).
    """
    key = f"{ROLLOUT}.full_determinism"
    if not s.get(key):
        return
    if s.spec.rollout.n > 1:
        why = f"gives every request the same seed: the {s.spec.rollout.n} responses to a prompt would be one"
    elif s.spec.resources.platform == "cpu":
        why = "gives requests a seed, at which vLLM's CPU engine ends: its generators have no offset"
    else:
        return
    yield s.problem(f"verl.{key} {why}", s.fix(key, False), key)


def notes(s: Settings) -> list[str]:
    """Notes, in sentences, on how to read the numbers that a run will report."""
    cut = " and ".join(f"{written(key)} = {s.get(key)}" for key, _ in _truncations(s))
    if cut and s.spec.correction.support == "kept":
        gives = "importance weights have mean 1, and the gradient is that of the truncated policy"
        return [f"{cut}: the trainer normalizes log-probs over the tokens that the rollout kept: {gives}"]
    if cut and takes_raw_log_probs(s.spec):
        gives = "the mean of the weights is the ratio of the two kept masses, close to 1"
        return [f"{cut}: importance weights take the rollout's log-probs over all tokens (raw_logprobs): {gives}"]
    if _reader(s) or s.get(MODE) != PROCESSED or not s.get(LOG_PROBS):
        return []
    meaning = (
        f"{cut}: vLLM's log-probs are renormalized over the kept tokens and the trainer's are not, so the reported KL"
        " between rollout and trainer is that of their arithmetic plus the mean of -ln(kept mass), and differences of"
        " probabilities hold the kept mass, too"
    )
    return [meaning] if cut else []


def _truncations(s: Settings) -> Iterator[tuple[str, float]]:
    """Yield the keys that make training rollouts exclude tokens, each with the value that excludes none."""
    if s.spec.rollout.top_p < 1:
        yield TOP_P, 1.0
    if s.spec.rollout.top_k > 0:
        yield TOP_K, -1


def _comparable(s: Settings) -> str:
    """What makes the log-probs of engine and trainer comparable while tokens are excluded."""
    if s.is_verbatim(MODE) and s.spec.rollout.temperature == 1:
        return s.fix(MODE, RAW)
    bounded = "" if 1 < s.spec.rollout.top_k <= _most_kept(s) else f" {s.fix(TOP_K, _most_kept(s))}"
    return f"{s.fix(TEMPERATURE, 1.0)}, {s.option(SUPPORT, 'kept')}{bounded}"


def _most_kept(s: Settings) -> int:
    """Largest top-k whose kept tokens are carried to the trainer; twice as many tokens must be in the vocabulary."""
    return min(contract.MOST_KEPT, s.shape.vocab // 2) if s.shape else contract.MOST_KEPT


def _reader(s: Settings) -> str | None:
    """Name of the setting through which the loss uses the rollout's log-probs; None if nothing uses them."""
    correction = s.spec.correction
    return WEIGHTED.get(correction.kind) or ("correction.reject" if correction.reject else None)


def _without(s: Settings) -> str:
    off = ["--tis off"] * (s.spec.correction.kind != "none")
    return " and ".join([*off, *(["--set correction.reject=null"] if s.spec.correction.reject else [])])


RULES: tuple[Rule, ...] = (
    weights_see_what_was_sampled,
    kept_tokens_are_known,
    log_probs_are_of_the_samples,
    temperature_is_the_engines,
    requests_are_not_engine_arguments,
    logits_are_not_processed,
    drafts_leave_the_distribution,
    responses_of_a_group_differ,
)
