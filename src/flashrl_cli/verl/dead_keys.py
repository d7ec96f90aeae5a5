"""verl keys that have no effect in a run of flashrl's, with what to write instead.

Such a run uses verl 0.9.1's V1 trainer, FSDP or FSDP2, and vLLM. verl itself does not report these keys. A
key is listed if none of the code that such a run executes acts on it, whatever its value. `data.truncation` and
`val_kwargs.do_sample` are not listed: the original recipes set them, and they do no harm. Files in `why` are relative
to verl/; "no reader" was found by searching verl's source.
"""

from __future__ import annotations

from typing import NamedTuple


class DeadKey(NamedTuple):
    """A key, or a prefix of keys, that has no effect; what to write instead, and how this is known.

    In `instead`, `verl.KEY` is a verl key; any other dotted name is a field of the spec.
    """

    key: str
    instead: str
    why: str
    modes: tuple[str, ...] = ()
    """Modes of the trainer in which verl acts on it all the same."""

    def covers(self, key: str) -> bool:
        """Whether `key` is this key or below it."""
        return key == self.key or key.startswith(f"{self.key}.")


A, M, R, C = "actor_rollout_ref.actor", "actor_rollout_ref.model", "actor_rollout_ref.rollout", "critic"
REF, CORRECTION, FILTER = "actor_rollout_ref.ref", "algorithm.rollout_correction", "algorithm.filter_groups"

_TIS = "correction.cap, or --tis CAP"
_NOTHING = "nothing in its place"
_ON_VALIDATION = "checked at the start, then never used (workers/engine_workers.py:583,624,628)"
_CLIP_GRAD = "never read (workers/engine/fsdp/transformer_impl.py:795)"
_CRITIC_TOKENS = "the critic batches by ppo_infer_max_token_len_per_gpu alone (trainer/ppo/v1/trainer_base.py:267)"
_DTYPE = "the FSDP engine reads mixed_precision only (workers/engine/fsdp/transformer_impl.py:391)"
_FSDP_LORA = "lora.* is Megatron's; FSDP reads the flat names (workers/engine/fsdp/transformer_impl.py:361)"
_HORIZON = "the trainer overwrites it (trainer/ppo/v1/trainer_base.py:782)"
_LEGACY = "the legacy reward tree is read by the fully-async trainer only"
_MEGATRON_MTP = "read by the Megatron engine only"
_NO_READER = "no reader"
_NO_REPLAY = "the FSDP engine replays no routes (workers/engine_workers.py:498)"
_COLOCATE, _SEPARATE = "colocate_async", "separate_async"
_OTHER_MODE = "trainer.mode is another one"
_SCHEMAS = "read in workers/rollout/schemas.py only, for SGLang"
_SGLANG = "read for SGLang only"
_STRATEGY = "overwritten by the strategy one level up (workers/config/{actor.py:325,critic.py:219})"
_V0 = "read by the V0 trainer only"

IGNORED = (
    DeadKey(f"{A}.calculate_sum_pi_squared", _NOTHING, _V0),
    DeadKey(
        f"{A}.clip_ratio",
        "algorithm.clip_low and algorithm.clip_high",
        "clip_ratio_low and clip_ratio_high are never null and win (trainer/ppo/core_algos.py:1321)",
    ),
    DeadKey(f"{A}.freeze_vision_tower", _NOTHING, _NO_READER),
    DeadKey(f"{A}.fsdp_config.dtype", f"verl.+{A}.fsdp_config.mixed_precision.param_dtype", _DTYPE),
    DeadKey(f"{A}.fsdp_config.strategy", f"verl.{A}.strategy", _STRATEGY),
    DeadKey(f"{A}.grad_clip", f"verl.{A}.optim.clip_grad", _CLIP_GRAD),
    DeadKey(f"{A}.optim.total_training_steps", "trainer.steps", _HORIZON),
    DeadKey(f"{A}.ppo_micro_batch_size", "algorithm.micro_batch_size_per_gpu", _ON_VALIDATION),
    DeadKey(
        f"{A}.qat",
        f"verl.{A}.fsdp_config.qat.*",
        "trainer and rollout read fsdp_config.qat (engine/fsdp/transformer_impl.py:173, config/rollout/rollout.yaml)",
    ),
    DeadKey(f"{A}.rollout_n", "rollout.n", _NO_READER),
    DeadKey(f"{A}.use_fused_kernels", f"verl.{M}.use_fused_kernels", "taken from the model (engine_workers.py:115)"),
    DeadKey(f"{A}.use_prefix_grouper", _NOTHING, _V0),
    DeadKey(f"{A}.use_remove_padding", "model.packing", "taken from the model (engine_workers.py:630)"),
    DeadKey(
        f"{A}.use_torch_compile",
        f"verl.{A}.fsdp_config.use_torch_compile",
        "the FSDP engine reads its own (workers/engine/fsdp/transformer_impl.py:185)",
    ),
    DeadKey("actor_rollout_ref.hybrid_engine", _NOTHING, _OTHER_MODE, (_SEPARATE,)),
    DeadKey(f"{M}.lora.adapter_path", f"verl.{M}.lora_adapter_path", _FSDP_LORA),
    DeadKey(f"{M}.lora.alpha", f"verl.{M}.lora_alpha", _FSDP_LORA),
    DeadKey(f"{M}.lora.dropout", _NOTHING, _FSDP_LORA),
    DeadKey(f"{M}.lora.exclude_modules", f"verl.{M}.exclude_modules", _FSDP_LORA),
    DeadKey(f"{M}.lora.rank", f"verl.{M}.lora_rank", _FSDP_LORA),
    DeadKey(f"{M}.lora.target_modules", f"verl.{M}.target_modules", _FSDP_LORA),
    DeadKey(f"{M}.mtp.detach_encoder", _NOTHING, _MEGATRON_MTP),
    DeadKey(f"{M}.mtp.enable_train", _NOTHING, _MEGATRON_MTP),
    DeadKey(f"{M}.mtp.mtp_loss_scaling_factor", _NOTHING, _MEGATRON_MTP),
    DeadKey(f"{M}.mtp.speculative_algorithm", f"verl.{M}.mtp.method", _SGLANG),
    DeadKey(f"{M}.mtp.speculative_eagle_topk", _NOTHING, _SGLANG),
    DeadKey(f"{M}.mtp.speculative_num_draft_tokens", f"verl.{M}.mtp.num_speculative_tokens", _SGLANG),
    DeadKey(f"{M}.mtp.speculative_num_steps", f"verl.{M}.mtp.num_speculative_tokens", _SGLANG),
    DeadKey(f"{M}.tiled_mlp", _NOTHING, "no reader: the FSDP engine does not pass it on (transformer_impl.py:324)"),
    DeadKey("actor_rollout_ref.nccl_timeout", _NOTHING, "no reader (workers/engine_workers.py:89 passes none)"),
    DeadKey(f"{REF}.fsdp_config.dtype", f"verl.+{REF}.fsdp_config.mixed_precision.param_dtype", _DTYPE),
    DeadKey(f"{REF}.fsdp_config.strategy", f"verl.{REF}.strategy", _STRATEGY),
    DeadKey(f"{REF}.log_prob_micro_batch_size", f"verl.{REF}.log_prob_micro_batch_size_per_gpu", _ON_VALIDATION),
    DeadKey(
        f"{REF}.use_torch_compile",
        f"verl.{REF}.fsdp_config.use_torch_compile",
        "the engine reads its own (workers/engine/fsdp/transformer_impl.py:185)",
    ),
    DeadKey(f"{R}.agent.custom_async_server", _NOTHING, _NO_READER),
    DeadKey(f"{R}.do_sample", "rollout.temperature", "vLLM gets temperature, top_p, top_k (v1/agent_loop_tq.py:64)"),
    DeadKey(f"{R}.log_prob_micro_batch_size", "rollout.log_prob_micro_batch_size_per_gpu", _ON_VALIDATION),
    DeadKey(f"{R}.multi_stage_wake_up", _NOTHING, _NO_READER),
    DeadKey(f"{R}.multi_turn.enable", f"verl.{R}.agent.default_agent_loop=tool_agent", _V0),
    DeadKey(f"{R}.multi_turn.num_repeat_rollouts", "rollout.n", _NO_READER),
    DeadKey(f"{R}.multi_turn.tokenization_sanity_check_mode", _NOTHING, _SCHEMAS),
    DeadKey(f"{R}.multi_turn.use_inference_chat_template", _NOTHING, _SCHEMAS),
    DeadKey(
        f"{R}.nnodes",
        "resources.nodes, or trainer.mode=separate_async",
        "all engines share the trainer's GPUs (trainer/ppo/v1/trainer_base.py:375)",
        (_SEPARATE,),
    ),
    DeadKey(f"{R}.over_sample_rate", _NOTHING, _NO_READER),
    DeadKey(f"{R}.trace", _NOTHING, "V1 traces no sample (trainer/ppo/v1/agent_loop_tq.py:88)"),
    DeadKey(f"{FILTER}.max_num_gen_batches", f"{FILTER}.max_inflight_batches", "ignored (v1/trainer_base.py:205)"),
    DeadKey("algorithm.pf_ppo", _NOTHING, _V0),
    DeadKey("algorithm.use_pf_ppo", _NOTHING, _V0),
    DeadKey(f"{C}.forward_max_token_len_per_gpu", "critic.max_tokens_per_gpu", _CRITIC_TOKENS),
    DeadKey(f"{C}.forward_micro_batch_size", "critic.max_tokens_per_gpu", _CRITIC_TOKENS),
    DeadKey(f"{C}.forward_micro_batch_size_per_gpu", "critic.max_tokens_per_gpu", _CRITIC_TOKENS),
    DeadKey(f"{C}.fsdp.dtype", f"verl.+{C}.fsdp.mixed_precision.param_dtype", _DTYPE),
    DeadKey(f"{C}.fsdp.strategy", f"verl.{C}.strategy", _STRATEGY),
    DeadKey(f"{C}.grad_clip", f"verl.{C}.optim.clip_grad", _CLIP_GRAD),
    DeadKey(f"{C}.model.lora", f"verl.{C}.model.lora_rank and verl.{C}.model.lora_alpha", _FSDP_LORA),
    DeadKey(f"{C}.model.tiled_mlp", _NOTHING, _NO_READER),
    DeadKey(f"{C}.optim.total_training_steps", "trainer.steps", _HORIZON),
    DeadKey(f"{C}.ppo_max_token_len_per_gpu", "critic.max_tokens_per_gpu", _CRITIC_TOKENS),
    DeadKey(f"{C}.ppo_micro_batch_size", "critic.max_tokens_per_gpu", _CRITIC_TOKENS),
    DeadKey(f"{C}.rollout_n", "rollout.n", _NO_READER),
    DeadKey(
        f"{C}.ulysses_sequence_parallel_size",
        f"verl.{C}.fsdp.ulysses_sequence_parallel_size",
        "not passed on to the engine, unlike the actor's (workers/config/critic.py:211)",
    ),
    DeadKey("custom_reward_function", "verl.reward.custom_reward_function.*", _LEGACY),
    DeadKey(
        "data.reward_fn_key", "a column data_source", "the reward loop reads that column (reward_manager/naive.py:42)"
    ),
    DeadKey("data.tokenizer", f"verl.{M}.tokenizer_path", _NO_READER),
    DeadKey("data.trust_remote_code", f"verl.{M}.trust_remote_code", _NO_READER),
    DeadKey("reward_model", "verl.reward.reward_model.*", _LEGACY),
    DeadKey("reward_model.model.path", "verl.reward.reward_model.model_path", _LEGACY),
    DeadKey("reward_model.num_workers", "verl.reward.num_workers", _LEGACY),
    DeadKey("reward_model.reward_manager", "reward.manager", _LEGACY),
    DeadKey("sandbox_fusion", "verl.reward.sandbox_fusion.*", _LEGACY),
    DeadKey("skip.async_rollout", "verl.skip.rollout_tq.*", "for the fully-async trainer"),
    DeadKey("skip.rollout", "verl.skip.rollout_tq.*", "for the V0 trainer (trainer/ppo/v1/agent_loop_tq.py:243)"),
    DeadKey("trainer.balance_batch", _NOTHING, "V1 always balances (trainer/ppo/v1/trainer_base.py:582)"),
    DeadKey(
        "trainer.default_hdfs_dir",
        "nothing in its place: copy the checkpoints yourself",
        "nothing is copied (utils/checkpoint/fsdp_checkpoint_manager.py:286)",
    ),
    DeadKey("trainer.esi_redundant_time", _NOTHING, _V0),
    DeadKey("trainer.ray_wait_register_center_timeout", _NOTHING, _V0),
    DeadKey("trainer.v1.colocate_async", _NOTHING, _OTHER_MODE, (_COLOCATE,)),
    DeadKey(
        "trainer.v1.sampler.sync_refill_failed_groups",
        _NOTHING,
        "asynchronous modes always replace them (trainer/ppo/v1/replay_buffer.py:532)",
        ("sync",),
    ),
    DeadKey("trainer.v1.separate_async", _NOTHING, _OTHER_MODE, (_SEPARATE,)),
    DeadKey(
        "trainer.v1.separate_async.hybrid_rollout",
        _NOTHING,
        "no rollout engine is on the trainer's GPUs (trainer/ppo/v1/trainer_separate_async.py:89)",
    ),
)
"""Keys in verl's tree, which Hydra therefore accepts."""

REMOVED = (
    DeadKey(f"{A}.behav_imp_weight_cap", _TIS, "was renamed"),
    DeadKey(f"{A}.checkpoint.contents", f"verl.{A}.checkpoint.save_contents", "was split into save_ and load_contents"),
    DeadKey(f"{A}.fsdp_config.grad_offload", f"verl.{A}.fsdp_config.param_offload", "gradients follow the parameters"),
    DeadKey(f"{A}.fsdp_config.router_replay", _NOTHING, _NO_REPLAY),
    DeadKey(f"{A}.imp_ratio_cap", _TIS, "was a fork's key"),
    DeadKey(f"{A}.router_replay", _NOTHING, _NO_REPLAY),
    DeadKey(f"{A}.sum_pi_squared_checkpointing", _NOTHING, "was removed"),
    DeadKey(f"{A}.tis_imp_ratio_cap", _TIS, "was renamed"),
    DeadKey(f"{A}.use_rollout_log_probs", _NOTHING, "no reader but the fully-async trainer's files"),
    DeadKey(f"{REF}.model", "model.path", "the reference policy is the actor's start (workers/engine_workers.py:556)"),
    DeadKey(f"{REF}.router_replay", _NOTHING, _NO_REPLAY),
    DeadKey(f"{R}.chat_scheduler", f"verl.{R}.agent.default_agent_loop", "agent loops replaced it"),
    DeadKey(
        f"{R}.engine_kwargs.vllm.override_generation_config",
        "rollout.temperature, rollout.top_p and rollout.top_k",
        "requests name their own sampling (trainer/ppo/v1/agent_loop_tq.py:63)",
    ),
    DeadKey(f"{R}.multi_turn.completion_callback", f"verl.{R}.agent.default_agent_loop", "agent loops replaced it"),
    DeadKey(f"{R}.multi_turn.enable_tokenization_sanity_check", _NOTHING, "was removed"),
    DeadKey(f"{R}.multi_turn.interaction_config_path", _NOTHING, "interactions were removed"),
    DeadKey(f"{R}.multi_turn.max_turns", f"verl.{R}.multi_turn.max_assistant_turns", "was renamed"),
    DeadKey(f"{R}.repetition_penalty", _NOTHING, "every request says 1.0 (trainer/ppo/v1/agent_loop_tq.py:68)"),
    DeadKey(f"{R}.skip_dump_dir", "verl.skip.rollout_tq.dump_dir", "was moved"),
    DeadKey(f"{R}.skip_rollout", "verl.skip.rollout_tq.enable", "was moved"),
    DeadKey(
        f"{R}.update_weights_bucket_megabytes",
        f"verl.{R}.checkpoint_engine.update_weights_bucket_megabytes",
        "was moved",
    ),
    DeadKey(f"{R}.use_fire_sampling", _NOTHING, "was removed"),
    DeadKey(
        f"{CORRECTION}.bypass_old_logprob_for_rollout",
        _NOTHING,
        "is now bypass_mode, in which V1 corrects nothing (trainer/ppo/v1/trainer_base.py:1767)",
    ),
    DeadKey(
        f"{CORRECTION}.rollout_rs_threshold_lower",
        "correction.reject.lower",
        "both bounds are one text, lower_upper (trainer/config/algorithm.py:108)",
    ),
    DeadKey(f"{CORRECTION}.rollout_token_veto_threshold", "correction.reject.by", "rejection replaced the veto"),
    DeadKey(f"{CORRECTION}.use_policy_gradient", _NOTHING, "V1 does not read what replaced it, loss_type"),
    DeadKey(f"{CORRECTION}.use_pure_rollout_correction", _NOTHING, "V1 does not read what replaced it, loss_type"),
    DeadKey("algorithm.rollout_is", _TIS, f"is now in {CORRECTION}"),
    DeadKey("algorithm.rollout_is_level", "correction.kind", f"is now in {CORRECTION}"),
    DeadKey("algorithm.rollout_is_mode", "correction.kind", "the form of the threshold decides"),
    DeadKey("algorithm.rollout_is_threshold", _TIS, f"is now in {CORRECTION}"),
    DeadKey("algorithm.rollout_is_threshold_lower", _NOTHING, "was removed"),
    DeadKey("algorithm.rollout_is_veto_threshold", "correction.reject.by", "rejection replaced the veto"),
    DeadKey(f"{C}.checkpoint.contents", f"verl.{C}.checkpoint.save_contents", "was split into save_ and load_contents"),
    DeadKey(f"{C}.model.fsdp_config", f"verl.{C}.fsdp.*", "was moved"),
    DeadKey("data.datagen", _NOTHING, "was removed"),
    DeadKey("data.sampler", _NOTHING, "was removed (trainer/ppo/utils.py:140)"),
    DeadKey("ray_init", "verl.ray_kwargs.ray_init.*", "was moved"),
    DeadKey("ray_init.timeline_json_file", "verl.ray_kwargs.timeline_json_file", "was moved"),
    DeadKey("reward_manager", "reward.manager", "was moved"),
    DeadKey("reward_model.launch_reward_fn_async", _NOTHING, "rewards always run beside the rollout"),
    DeadKey(
        "reward_model.overlong_buffer",
        "reward.overlong.buffer_len, reward.overlong.penalty_factor and reward.overlong.log",
        "not in verl's tree",
    ),
    DeadKey("reward_model.reward_kwargs", "reward.overlong.buffer_len, or verl.+reward.reward_kwargs.*", _LEGACY),
    DeadKey("reward_model.sandbox_fusion", "verl.reward.sandbox_fusion.*", "was moved"),
    DeadKey("trainer.controller_nsight_options", "verl.global_profiler.global_tool_config.nsys.*", "was moved"),
    DeadKey("trainer.profile_continuous_steps", "verl.global_profiler.profile_continuous_steps", "was moved"),
    DeadKey("trainer.profile_steps", "verl.global_profiler.steps", "was moved"),
    DeadKey("trainer.use_legacy_worker_impl", _NOTHING, "the legacy workers were removed"),
    DeadKey("trainer.val_generations_to_log_to_wandb", "verl.trainer.log_val_generations", "was renamed"),
    DeadKey("trainer.worker_nsight_options", "verl.global_profiler.global_tool_config.nsys.*", "was moved"),
)
"""Keys of older configuration files that verl's tree no longer has, or never had; Hydra accepts them only with a `+`.
"""

DEAD_KEYS = IGNORED + REMOVED


def dead_key(key: str, mode: str = "sync") -> DeadKey | None:
    """The most specific entry for a verl key that has no effect in a mode of the trainer; None for one that has."""
    found = (dead for dead in DEAD_KEYS if dead.covers(key) and mode not in dead.modes)
    return max(found, key=lambda dead: len(dead.key), default=None)
