"""Translates a resolved RunSpec into overrides of verl 0.9.1, by the only table from flashrl's names to verl's.

A field becomes an override if it was set or derived. An untouched default is verl's own and is left out, except where
flashrl's default differs (`always`). `quote` writes values as Hydra's command line reads them back; `by_theme` groups
overrides for display.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flashrl_cli import contract, paths
from flashrl_cli.config.layers import Origin
from flashrl_cli.errors import Location
from flashrl_cli.precision import KV_CACHES, PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RejectSpec, RunSpec

Value = bool | int | float | str | None | Sequence["Value"]

# Text that Hydra's lexer takes as it is; anything that could be a number, a keyword or an operator is quoted.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+%@-]*")
_KEYWORD = re.compile(r"null|true|false|inf|nan", re.IGNORECASE)


def quote(value: Value) -> str:
    """Text of `value` in Hydra's override grammar; parsing it gives an equal value of the same type."""
    match value:
        case None:
            return "null"
        case bool() | int():
            return str(value)
        case float():
            return _float(value)
        case str():
            return value if _PLAIN.fullmatch(value) and not _KEYWORD.fullmatch(value) else _quoted(value)
        case _:
            return f"[{','.join(quote(item) for item in value)}]"


def _float(value: float) -> str:
    """Shortest text of a number: `1e-6` rather than Python's `1e-06`."""
    return re.sub(r"e([-+]?)0+(\d)", r"e\1\2", repr(value))


def _quoted(text: str) -> str:
    """Text in single quotes; backslashes are escaped only before a quote.

    See QuotedString in hydra/core/override_parser/types.py.
    """
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


ACTOR = "actor_rollout_ref.actor"
ATTENTION = "override_config.attn_implementation"
"""Key, below a model's node, of Transformers' attention implementation; verl's tree lacks it."""
MODEL = "actor_rollout_ref.model"
REF = "actor_rollout_ref.ref"
ROLLOUT = "actor_rollout_ref.rollout"
ENGINE = f"{ROLLOUT}.engine_kwargs.vllm"
LOG_PROBS_MODE = f"{ROLLOUT}.logprobs_mode"
PROCESSED, RAW = "processed_logprobs", "raw_logprobs"
"""Modes of vLLM's log-probs: after temperature and truncation, which is what it samples from, and before both."""
MAX_LOG_PROBS = f"{ENGINE}.max_logprobs"
EXTERNAL_LIB = f"{MODEL}.external_lib"
STREAM_INTERVAL = f"{ENGINE}.stream_interval"
DATASET, DATASET_NAME = "data.custom_cls.path", "data.custom_cls.name"
SAMPLER = "trainer.v1.sampler.custom_sampler.path"
SAMPLER_NAME = "trainer.v1.sampler.custom_sampler.name"
AGENT_LOOPS = f"{ROLLOUT}.agent.agent_loop_manager_class"
CORRECTION = "algorithm.rollout_correction"
WEIGHTS = {"none": None, "tis": "token", "icepop": "token", "seq-tis": "sequence"}
"""verl's level of the weights of each `correction.kind`."""
LOSS_FIELD, LOSS_MODE = "algorithm.loss", f"{ACTOR}.policy_loss.loss_mode"
AUTO = "auto"
V1 = "trainer.v1"
MODE_FIELD, MODE = "trainer.mode", f"{V1}.trainer_mode"
SEPARATE = "separate_async"
"""verl's mode with GPUs for rollout engines alone."""
HYBRID = "actor_rollout_ref.hybrid_engine"
BACKEND = f"{ROLLOUT}.checkpoint_engine.backend"
NCCL = "nccl"
BACKEND_MODULE = f"{ROLLOUT}.checkpoint_engine.custom_backend_module"
RAY_CPUS = "ray_kwargs.ray_init.num_cpus"
RAY_GPUS = "ray_kwargs.ray_init.num_gpus"
OVERLONG = "reward.reward_kwargs.overlong_buffer_cfg"
CUSTOM_REWARD = "reward.custom_reward_function.path"
CUSTOM_REWARD_NAME = "reward.custom_reward_function.name"


@dataclass(frozen=True, slots=True)
class Override:
    """One `key=value` for verl, with its origin; an `added` key is not in verl's tree and takes a `+`."""

    key: str
    value: Value
    origin: Origin
    added: bool = False

    def __str__(self) -> str:
        return f"{'+' if self.added else ''}{self.key}={quote(self.value)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What a run's overrides need besides its spec: the run's name and absolute folders."""

    name: str
    data: Path
    checkpoints: Path
    resume_from: Path | None = None


class Entry(NamedTuple):
    """A field of the spec, the verl key that it becomes, and how its value is converted."""

    field: str
    key: str
    always: bool = False
    added: bool = False
    convert: Callable[[Any, Path], Value] | None = None


def model_path(reference: str, data: Path) -> str:
    """Absolute path of `prepared:NAME` or of a local folder; a Hugging Face id is returned unchanged."""
    if prepared := paths.prepared_model(reference, data):
        return str(prepared)
    return str(paths.absolute(reference)) if reference.startswith(("/", "~", ".")) else reference


def data_path(split: str) -> Callable[[str, Path], str]:
    """Converter of a prepared data set's name (to its `split` file) or of a path to an absolute path."""

    def convert(reference: str, data: Path) -> str:
        if "/" in reference or reference.endswith((".parquet", ".json", ".jsonl")):
            return str(paths.absolute(reference))
        return str(paths.DatasetPaths(reference, data / reference).split(split))

    return convert


def data_paths(split: str) -> Callable[[str | Sequence[str], Path], Value]:
    """The same for one data set or for several."""

    def convert(references: str | Sequence[str], data: Path) -> Value:
        one = data_path(split)
        return one(references, data) if isinstance(references, str) else [one(name, data) for name in references]

    return convert


TABLE = (
    Entry("data.train", "data.train_files", convert=data_paths("train")),
    Entry("data.val", "data.val_files", convert=data_paths("test")),
    Entry("data.train_batch_size", "data.train_batch_size"),
    Entry("data.max_prompt_length", "data.max_prompt_length"),
    Entry("data.max_response_length", "data.max_response_length"),
    Entry("data.filter_overlong", "data.filter_overlong_prompts"),
    Entry("algorithm.advantage", "algorithm.adv_estimator", convert=lambda name, _: name.replace("-", "_")),
    Entry("algorithm.normalize_by_std", "algorithm.norm_adv_by_std_in_grpo"),
    Entry("algorithm.kl_in_reward", "algorithm.use_kl_in_reward"),
    Entry("algorithm.kl_in_reward_coef", "algorithm.kl_ctrl.kl_coef"),
    Entry("algorithm.filter_groups.enable", "algorithm.filter_groups.enable"),
    Entry("algorithm.filter_groups.metric", "algorithm.filter_groups.metric"),
    Entry("algorithm.filter_groups.max_inflight_batches", "algorithm.filter_groups.max_inflight_gen_batches"),
    Entry("model.path", f"{MODEL}.path", convert=model_path),
    Entry("model.packing", f"{MODEL}.use_remove_padding"),
    Entry("model.packing", "critic.model.use_remove_padding"),
    Entry("model.recompute", f"{MODEL}.enable_gradient_checkpointing"),
    Entry("model.recompute", "critic.model.enable_gradient_checkpointing"),
    Entry("algorithm.lr", f"{ACTOR}.optim.lr"),
    Entry("algorithm.mini_batch_size", f"{ACTOR}.ppo_mini_batch_size"),
    Entry("algorithm.micro_batch_size_per_gpu", f"{ACTOR}.ppo_micro_batch_size_per_gpu"),
    Entry("algorithm.max_tokens_per_gpu", f"{ACTOR}.ppo_max_token_len_per_gpu"),
    Entry("algorithm.clip_low", f"{ACTOR}.clip_ratio_low"),
    Entry("algorithm.clip_high", f"{ACTOR}.clip_ratio_high"),
    Entry("algorithm.clip_c", f"{ACTOR}.clip_ratio_c"),
    Entry("algorithm.loss_aggregation", f"{ACTOR}.loss_agg_mode"),
    Entry("algorithm.entropy_coeff", f"{ACTOR}.entropy_coeff"),
    Entry("algorithm.kl_loss", f"{ACTOR}.use_kl_loss"),
    Entry("algorithm.kl_loss_coef", f"{ACTOR}.kl_loss_coef"),
    Entry("critic.path", "critic.model.path", convert=model_path),
    Entry("critic.lr", "critic.optim.lr"),
    Entry("critic.micro_batch_size_per_gpu", "critic.ppo_micro_batch_size_per_gpu"),
    # V1's critic is bounded by this key (verl/trainer/ppo/v1/trainer_base.py:266), which only verl's dataclass has
    Entry("critic.max_tokens_per_gpu", "critic.ppo_infer_max_token_len_per_gpu", added=True),
    Entry("rollout.n", f"{ROLLOUT}.n"),
    Entry("rollout.temperature", f"{ROLLOUT}.temperature"),
    Entry("rollout.top_p", f"{ROLLOUT}.top_p"),
    Entry("rollout.top_k", f"{ROLLOUT}.top_k"),
    Entry("rollout.tensor_parallel", f"{ROLLOUT}.tensor_model_parallel_size", always=True),
    Entry("rollout.gpu_memory_utilization", f"{ROLLOUT}.gpu_memory_utilization"),
    Entry("rollout.max_num_seqs", f"{ROLLOUT}.max_num_seqs"),
    Entry("rollout.max_num_batched_tokens", f"{ROLLOUT}.max_num_batched_tokens"),
    Entry("rollout.max_model_len", f"{ROLLOUT}.max_model_len"),
    Entry("rollout.enforce_eager", f"{ROLLOUT}.enforce_eager"),
    Entry("rollout.log_prob_micro_batch_size_per_gpu", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu"),
    Entry("rollout.log_prob_max_tokens_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu"),
    Entry("reward.manager", "reward.reward_manager.name"),
    Entry("reward.overlong.buffer_len", f"{OVERLONG}.len", added=True),
    Entry("reward.overlong.penalty_factor", f"{OVERLONG}.penalty_factor", added=True, always=True),
    Entry("reward.overlong.log", f"{OVERLONG}.log", added=True, always=True),
    Entry("trainer.project", "trainer.project_name"),
    Entry("trainer.epochs", "trainer.total_epochs"),
    Entry("trainer.steps", "trainer.total_training_steps"),
    Entry("trainer.save_every", "trainer.save_freq"),
    Entry("trainer.validate_every", "trainer.test_freq"),
    Entry("trainer.validate_before", "trainer.val_before_train"),
    Entry("trainer.critic_warmup", "trainer.critic_warmup"),
    Entry("trainer.logger", "trainer.logger", always=True),
    Entry("trainer.max_staleness", f"{V1}.sampler.max_off_policy_threshold"),
    Entry("trainer.stale", f"{V1}.sampler.max_off_policy_strategy"),
    Entry("resources.nodes", "trainer.nnodes", always=True),
    Entry("resources.gpus_per_node", "trainer.n_gpus_per_node", always=True),
    Entry("resources.rollout_nodes", f"{ROLLOUT}.nnodes"),
    Entry("resources.rollout_gpus_per_node", f"{ROLLOUT}.n_gpus_per_node"),
)


def overrides(resolved: Resolved, places: Places) -> tuple[Override, ...]:
    """All overrides of a run, grouped by the functions below and in their order, those of `verl:` last.

    Pure, except that relative paths in the spec are resolved against the working folder. Where a field is still `auto`,
    verl's own default is left in place.
    """
    return (
        *_trainer(resolved),
        *_quick(resolved),
        *_fields(resolved, places.data),
        *_asynchrony(resolved),
        *_mixture(resolved),
        *_attention(resolved),
        *_passes(resolved),
        *_reward(resolved),
        *_precision(resolved),
        *_correction(resolved),
        *_run(resolved, places),
        *_verbatim(resolved),
    )


def verbatim_keys(spec: RunSpec) -> dict[str, Any]:
    """The keys that `verl:` gives word for word with their values, without Hydra's plus for a new one."""
    return {written.removeprefix("+"): value for written, value in spec.verl.items()}


def _trainer(resolved: Resolved) -> Iterator[Override]:
    why = Origin("derived", reason="verl's V1 trainer, in each of its modes")
    yield Override("trainer.use_v1", True, why)
    yield Override(MODE, resolved.spec.trainer.mode, resolved.origins[MODE_FIELD])
    yield Override(f"{ROLLOUT}.name", "vllm", Origin("derived", reason="verl names no engine by default"))


def _quick(resolved: Resolved) -> Iterator[Override]:
    """What makes a rollout with many short responses quick (sampler.py, agent_loop.py and outputs.py of plugins/)."""
    given = verbatim_keys(resolved.spec)
    if not given.keys() & {SAMPLER, SAMPLER_NAME}:
        why = Origin("derived", reason="verl's own buffer looks for finished responses every 2 s")
        yield Override(SAMPLER, contract.SAMPLER[0], why)
        yield Override(SAMPLER_NAME, contract.SAMPLER[1], why)
    if AGENT_LOOPS not in given:
        why = Origin("derived", reason="verl's own workers send some ten messages for each response")
        yield Override(AGENT_LOOPS, contract.AGENT_LOOPS, why, added=True)
    if STREAM_INTERVAL not in given:
        why = Origin("derived", reason="nothing reads a response before it is complete")
        yield Override(STREAM_INTERVAL, contract.TOKENS_A_MESSAGE, why, added=True)


def _fields(resolved: Resolved, data: Path) -> Iterator[Override]:
    for entry in TABLE:
        value = resolved.value(entry.field)
        # no field of the table takes `auto` as verl's value
        if value in (None, AUTO) or not (entry.always or resolved.is_set(entry.field)) or _unread(entry, resolved):
            continue
        converted = entry.convert(value, data) if entry.convert else value
        yield Override(entry.key, converted, resolved.origins[entry.field], entry.added)


def _asynchrony(resolved: Resolved) -> Iterator[Override]:
    """What verl's asynchronous modes need, besides the fields of the table.

    In `separate_async` verl samples and trains on one mini-batch after another, and sends the weights once all of a
    batch are done (verl/trainer/ppo/v1/trainer_separate_async.py:59). Its engines on the trainer's GPUs are left out:
    they would generate at the start and in validation only, and hold memory otherwise.
    """
    spec = resolved.spec
    mode = spec.trainer.mode
    if mode == "sync":
        return
    yield Override(f"{V1}.{mode}.num_warmup_batches", spec.trainer.prefetch, resolved.origins["trainer.prefetch"])
    if mode != SEPARATE:
        return
    given = verbatim_keys(spec)
    steps = max(1, spec.data.train_batch_size // spec.algorithm.mini_batch_size)
    why = Origin("derived", reason="data.train_batch_size / algorithm.mini_batch_size")
    yield Override(f"{V1}.{mode}.parameter_sync_step", steps, why)
    if HYBRID not in given:
        yield Override(HYBRID, False, Origin("derived", reason="all rollout engines have GPUs of their own"))
    name, module = contract.CHECKPOINT_ENGINE
    backend = checkpoint_backend(spec)
    if BACKEND not in given:
        yield Override(BACKEND, backend, resolved.origins["resources.platform"])
    if backend == name and BACKEND_MODULE not in given:
        yield Override(BACKEND_MODULE, module, Origin("derived", reason=f"registers the backend {name}"))


def checkpoint_backend(spec: RunSpec) -> str:
    """By what weights go to rollout engines with devices of their own: over NCCL on GPUs, unless `verl:` says else."""
    given = verbatim_keys(spec)
    return str(given.get(BACKEND, contract.CHECKPOINT_ENGINE[0] if spec.resources.platform == "cpu" else NCCL))


def _mixture(resolved: Resolved) -> Iterator[Override]:
    """verl's data set of several files, unless the preset names a class of its own (plugins/mixture.py)."""
    data = resolved.spec.data
    given = verbatim_keys(resolved.spec)
    if (isinstance(data.train, str) and isinstance(data.val, str)) or DATASET in given:
        return
    why = Origin("derived", reason="the files of a list need not have the same columns")
    yield Override(DATASET, contract.MIXTURE[0], why)
    yield Override(DATASET_NAME, contract.MIXTURE[1], why)
    if data.shares is not None:
        yield Override(f"data.{contract.SHARES}", data.shares, resolved.origins["data.shares"], added=True)


def _unread(entry: Entry, resolved: Resolved) -> bool:
    spec = resolved.spec
    if entry.field.startswith("resources.rollout_"):
        return spec.trainer.mode != SEPARATE
    return entry.key.startswith("critic.") and spec.algorithm.advantage != "gae"


def _passes(resolved: Resolved) -> Iterator[Override]:
    """Whether passes are batched by tokens, and the reference policy's passes, which are those of the log-probs.

    The reference policy's keys, unlike the others, may be given under `verl:` instead. V1's critic is always batched by
    tokens (verl/trainer/ppo/v1/trainer_base.py:266), so verl need not demand its micro-batch size.
    """
    spec = resolved.spec
    by_tokens = spec.algorithm.max_tokens_per_gpu is not None
    update, log_probs = "algorithm.max_tokens_per_gpu", "rollout.log_prob_max_tokens_per_gpu"
    if by_tokens:
        yield Override(f"{ACTOR}.use_dynamic_bsz", True, resolved.origins[update])
        yield Override(f"{ROLLOUT}.log_prob_use_dynamic_bsz", True, resolved.origins[update])
    if spec.algorithm.advantage == "gae":
        why = Origin("derived", reason="verl's critic always batches by tokens")
        yield Override("critic.use_dynamic_bsz", True, why)
    if not (spec.algorithm.kl_loss or spec.algorithm.kl_in_reward):
        return
    field = log_probs if by_tokens else "rollout.log_prob_micro_batch_size_per_gpu"
    key = f"{REF}.log_prob_{'max_token_len' if by_tokens else 'micro_batch_size'}_per_gpu"
    given = verbatim_keys(spec)
    value = resolved.value(field)
    if value not in (None, AUTO) and not given.keys() & {key, f"{REF}.log_prob_micro_batch_size"}:
        yield Override(key, value, Origin("derived", reason=f"{field}, as the policy's log-probs"))


def _attention(resolved: Resolved) -> Iterator[Override]:
    """The attention of policy and critic, none while it is `auto`.

    A key under `verl:` takes its place, because it may name any implementation of Transformers.
    """
    value, origin = resolved.spec.model.attention, resolved.origins["model.attention"]
    given = verbatim_keys(resolved.spec)
    for node in (MODEL, *(["critic.model"] if resolved.spec.algorithm.advantage == "gae" else [])):
        key = f"{node}.{ATTENTION}"
        if value != AUTO and key not in given:
            yield Override(key, value, origin, added=True)


def _reward(resolved: Resolved) -> Iterator[Override]:
    """The user's function, which plugins/reward.py calls, and what verl's `dapo` manager needs besides typed fields.

    The manager's keys are read in verl/experimental/reward_loop/reward_manager/dapo.py:33-48.
    """
    if resolved.spec.reward.function is not None:
        origin = resolved.origins["reward.function"]
        yield Override(CUSTOM_REWARD, contract.REWARD[0], origin)
        yield Override(CUSTOM_REWARD_NAME, contract.REWARD[1], origin)
    if resolved.spec.reward.overlong:
        why = Origin("derived", reason="reward.overlong")
        yield Override(f"{OVERLONG}.enable", True, why, added=True)
        longest = resolved.spec.data.max_response_length
        yield Override("reward.reward_kwargs.max_resp_len", longest, why, added=True)


def _precision(resolved: Resolved) -> Iterator[Override]:
    """The rollout's precision: verl's by verl's key, flashrl's vLLM methods by arguments of the engine.

    The worker extension receives the weight updates. For flashrl's methods it replaces verl's weight update; for bf16
    and verl's own precisions on CUDA it runs verl's and checks that the update was complete. vLLM's CPU build repacks
    weights after loading, so there every precision needs flashrl's weight update.
    """
    origin = resolved.origins["rollout.precision"]
    rollout = resolved.spec.rollout
    row = PRECISIONS[rollout.precision]
    if row.verl:
        yield Override(f"{ROLLOUT}.quantization", row.verl, origin)
    if row.method:
        yield Override(f"{ENGINE}.quantization", row.method, origin, added=True)
    if cache := KV_CACHES.get(rollout.kv_cache):
        yield Override(f"{ENGINE}.kv_cache_dtype", cache.vllm, resolved.origins["rollout.kv_cache"], added=True)
    why = _extension_reason(resolved)
    extension = contract.WORKER_EXTENSION if why else contract.CHECKED_EXTENSION
    because = (
        resolved.origins[why]
        if why
        else Origin("derived", reason="every parameter must be written at each weight update")
    )
    yield Override(f"{ENGINE}.worker_extension_cls", extension, because, added=True)


def _extension_reason(resolved: Resolved) -> str | None:
    """The field that makes rollout workers use flashrl's weight update; None if they use verl's, with a check."""
    rollout = resolved.spec.rollout
    if PRECISIONS[rollout.precision].method:
        return "rollout.precision"
    options = ("kv_cache", "profile", "mix", "lm_head_fp32")
    asked = (f"rollout.{name}" for name in options if getattr(rollout, name) not in {None, "auto", 0})
    return next(asked, "resources.platform" if resolved.spec.resources.platform == "cpu" else None)


def _correction(resolved: Resolved) -> Iterator[Override]:
    """Weights and rejection in verl's decoupled mode (verl/trainer/ppo/rollout_corr_helper.py), and the loss.

    A threshold of two bounds, as text, makes verl zero weights outside of them instead of truncating them (:595).
    """
    correction, origin = resolved.spec.correction, resolved.origins["correction.cap"]
    weighted, reject = correction.kind != "none", correction.reject
    cap = float(correction.cap or 0)
    yield Override(f"{CORRECTION}.rollout_is", WEIGHTS[correction.kind], origin)
    if weighted:
        bounds = f"{float(correction.lower or 0)}_{cap}" if correction.kind == "icepop" else cap
        yield Override(f"{CORRECTION}.rollout_is_threshold", bounds, origin)
        yield Override(f"{CORRECTION}.rollout_is_batch_normalize", False, origin)
    if reject:
        yield Override(f"{CORRECTION}.rollout_rs", verl_rejection(reject), resolved.origins["correction.reject.by"])
        upper = resolved.origins["correction.reject.upper"]
        yield Override(f"{CORRECTION}.rollout_rs_threshold", _rejection_threshold(reject), upper)
    elif weighted:
        yield Override(f"{CORRECTION}.rollout_rs", None, origin)
    if correction.active:
        yield Override(f"{CORRECTION}.bypass_mode", False, origin)
    yield from _loss(resolved)
    if correction.active:
        yield Override(f"{ROLLOUT}.calculate_log_probs", True, origin)
        yield from _compared(resolved)


def _compared(resolved: Resolved) -> Iterator[Override]:
    """Over which tokens the log-probs are that weights and rejection compare (plugins/support.py)."""
    origins, given = resolved.origins, verbatim_keys(resolved.spec)
    if takes_raw_log_probs(resolved.spec):
        cut = Origin("derived", reason="the trainer's log-probs are not renormalized over the kept tokens either")
        yield Override(LOG_PROBS_MODE, RAW, cut)
    else:
        yield Override(LOG_PROBS_MODE, PROCESSED, origins["correction.cap"])
    if resolved.spec.correction.support == "full":
        return
    if EXTERNAL_LIB not in given:
        yield Override(EXTERNAL_LIB, contract.SUPPORT, origins["correction.support"])
    if MAX_LOG_PROBS not in given:
        # validation's top-k may be a larger one
        most = contract.kept_columns(contract.MOST_KEPT)
        yield Override(MAX_LOG_PROBS, most, origins["correction.support"], added=True)


def truncates(spec: RunSpec) -> bool:
    """Whether training rollouts exclude tokens by top-k or top-p."""
    return spec.rollout.top_p < 1 or spec.rollout.top_k > 0


def takes_raw_log_probs(spec: RunSpec) -> bool:
    """Whether importance weights need the rollout's log-probs of all tokens, which vLLM takes before the temperature.

    Over the kept tokens K, with masses Z of the trainer's probabilities and Z' of the rollout's, the mean of
    w = p_train / p_rollout is then Z / Z', and not Z.
    """
    correction = spec.correction
    over_all = correction.active and correction.support == "full"
    return over_all and truncates(spec) and spec.rollout.temperature == 1


def verl_rejection(reject: RejectSpec) -> str:
    """verl's name of a rejection, such as `seq_mean_k1`."""
    return f"{reject.by.replace('-', '_')}_{reject.estimator}"


def _rejection_threshold(reject: RejectSpec) -> float | str:
    """verl's bounds of a rejection: of k1 as text, and of p_rollout / p_train, the inverse of the weight.

    See verl/trainer/ppo/rollout_corr_helper.py:263 and :304; a test in tests/contract compares what is kept.
    """
    if reject.estimator != "k1":
        return float(reject.upper)
    return f"{1 / reject.upper}_{1 / (reject.lower or 1 / reject.upper)}"


def _loss(resolved: Resolved) -> Iterator[Override]:
    """The loss by verl's name, and KL-Cov's coefficient.

    That is 1 in its paper (arXiv 2505.22617) and in verl's code, but not in its configuration
    (verl/trainer/ppo/core_algos.py:1855, verl/trainer/config/actor/actor.yaml:76).
    """
    loss, origin = resolved.spec.algorithm.loss, resolved.origins[LOSS_FIELD]
    if resolved.is_set(LOSS_FIELD) or resolved.spec.correction.kind != "none":
        because = origin if resolved.is_set(LOSS_FIELD) else resolved.origins["correction.cap"]
        yield Override(LOSS_MODE, verl_loss(loss), because)
    coefficient = f"{ACTOR}.policy_loss.ppo_kl_coef"
    if loss == "kl-cov" and coefficient not in verbatim_keys(resolved.spec):
        yield Override(coefficient, 1.0, origin)


def verl_loss(loss: str) -> str:
    """verl's name of a policy loss."""
    return {"ppo": "vanilla", "gmpo": "geo_mean"}.get(loss, loss.replace("-", "_"))


def _run(resolved: Resolved, places: Places) -> Iterator[Override]:
    """What depends on the run, not on its preset; folders are absolute, as Ray's workers have other working folders."""
    if resolved.spec.resources.platform == "cpu":
        yield Override("trainer.device", "cpu", resolved.origins["resources.platform"])
        yield from _logical_gpus(resolved)
    why = Origin("derived", reason="the run's name")
    yield Override("trainer.experiment_name", places.name, why)
    yield Override("trainer.default_local_dir", str(places.checkpoints), why)
    if places.resume_from is None:
        yield Override("trainer.resume_mode", "auto", Origin("derived", reason="an interrupted run goes on"))
    else:
        resume = Origin("option", Location("--resume"))
        yield Override("trainer.resume_mode", "resume_path", resume)
        yield Override("trainer.resume_from_path", str(places.resume_from), resume)


def _logical_gpus(resolved: Resolved) -> Iterator[Override]:
    """As many logical GPUs as verl asks Ray for, where the preset describes the Ray of a run on CPUs."""
    spec = resolved.spec
    given = verbatim_keys(spec)
    if given.get(RAY_CPUS) is not None and RAY_GPUS not in given and spec.resources.nodes == 1:
        why = Origin("derived", reason="verl asks Ray for a GPU for each trainer process and rollout engine")
        yield Override(RAY_GPUS, spec.resources.all_devices, why, added=True)


def _verbatim(resolved: Resolved) -> Iterator[Override]:
    for written, value in resolved.spec.verl.items():
        key = written.removeprefix("+")
        yield Override(key, value, resolved.origins[f"verl.{written}"], added=key != written)


THEMES: Mapping[str, tuple[str, ...]] = {
    "data": ("data",),
    "model": (MODEL, "actor_rollout_ref.model_engine", "model_engine"),
    "importance sampling": (
        CORRECTION,
        f"{ACTOR}.policy_loss",
        f"{ROLLOUT}.calculate_log_probs",
        LOG_PROBS_MODE,
    ),
    "algorithm": ("algorithm",),
    "policy": (ACTOR, REF),
    "critic": ("critic",),
    "rollout": (ROLLOUT,),
    "reward": ("reward",),
    "trainer": ("trainer",),
}
"""Prefixes of keys by theme, in the order of display; a key belongs to the first theme that covers it."""
OTHER = "machine"


def by_theme(overrides: Iterable[Override]) -> dict[str, list[Override]]:
    """The overrides by theme, in the order of `THEMES` and, within a theme, of the list; empty themes are left out."""
    groups: dict[str, list[Override]] = {theme: [] for theme in (*THEMES, OTHER)}
    for override in overrides:
        groups[_theme(override.key)].append(override)
    return {theme: group for theme, group in groups.items() if group}


def _theme(key: str) -> str:
    return next((theme for theme, starts in THEMES.items() if any(_covers(start, key) for start in starts)), OTHER)


def _covers(start: str, key: str) -> bool:
    return key == start or key.startswith(f"{start}.")
