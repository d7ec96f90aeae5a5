"""Mistakes in what the trainer does."""

from __future__ import annotations

from tests.contract.demands_case import CORRECTION, A, R, case

LEARNING = [
    case(
        "loss_is_known",
        f"verl.{A}.policy_loss.loss_mode=gsp",
        says="no policy loss gsp",
        hint=f"{A}.policy_loss.loss_mode=gspo",
        legal=(f"verl.{A}.policy_loss.loss_mode=gspo",),
    ),
    case(
        "loss_is_known",
        f"verl.{A}.policy_loss.loss_mode=dro",
        says="needs a positive",
        hint=f"{A}.policy_loss.dro_beta=0.1",
        legal=(f"verl.{A}.policy_loss.loss_mode=dro", f"verl.{A}.policy_loss.dro_beta=0.1"),
    ),
    case(
        "rejection_is_complete",
        f"verl.{CORRECTION}.rollout_rs=geometric",
        f"verl.{CORRECTION}.rollout_rs_threshold=2.0",
        says="no rejection sampling geometric",
        hint="one of token_k1",
        legal=(f"verl.{CORRECTION}.rollout_rs=token_k2,seq_max_k3", f"verl.{CORRECTION}.rollout_rs_threshold=2.0"),
    ),
    case(
        "rejection_is_complete",
        f"verl.{CORRECTION}.rollout_rs=token_k1",
        says="needs a threshold",
        hint="rollout_rs_threshold=2.0",
    ),
    case(
        "log_probs_come_with_samples",
        f"verl.{R}.calculate_log_probs=false",
        f"verl.{CORRECTION}.bypass_mode=true",
        says="bypass_mode needs the log-probs of the rollout",
        hint=f"verl.{R}.calculate_log_probs=true",
        legal=(f"verl.{CORRECTION}.bypass_mode=true",),
    ),
    case(
        "critic_follows_advantage",
        "verl.critic.enable=false",
        says="contradicts algorithm.advantage = gae",
        hint="drop it",
        legal=("verl.critic.enable=true",),
    ),
    case(
        "metric_is_reported",
        "algorithm.filter_groups.metric=seq_reward",
        says="no reward of verl's reports seq_reward",
        hint="--set algorithm.filter_groups.metric=reward",
        preset="dapo-32b",
        legal=("algorithm.filter_groups.metric=score",),
    ),
    case(
        "sampler_filters_groups",
        "algorithm.filter_groups.enable=true",
        says="does nothing for algorithm.filter_groups.enable",
        hint="--set verl.trainer.v1.sampler.custom_sampler.path=null",
        preset="tiny",
        legal=("algorithm.filter_groups.enable=true", "verl.trainer.v1.sampler.custom_sampler.path=pkg://mine"),
    ),
    case(
        "filter_sees_rewards",
        "verl.reward.reward_model.enable=true",
        says="devices of its own",
        hint="verl.reward.reward_model.enable_resource_pool=true",
        preset="dapo-32b",
    ),
    case(
        "workers_exist",
        "verl.reward.num_workers=0",
        says="at least one",
        hint="verl.reward.num_workers=1",
        legal=("verl.reward.num_workers=1",),
    ),
    case(
        "reward_function_is_there",
        "verl.reward.custom_reward_function.path=reward.py",
        says="is not absolute",
        hint="/reward.py",
        legal=("verl.reward.custom_reward_function.path=pkg://mine.reward",),
    ),
    case(
        "reward_function_is_there",
        "verl.reward.custom_reward_function.path=file:///nowhere/reward.py",
        says="there is no /nowhere/reward.py",
        hint="pkg://MODULE",
        legal=("verl.reward.custom_reward_function.path=file:///nowhere/reward.py", "resources.nodes=2"),
    ),
    case(
        "overlong_is_typed",
        "verl.+reward.reward_kwargs.overlong_buffer_cfg.enable=true",
        says="alone is not enough",
        hint="--set reward.manager=dapo --set reward.overlong.buffer_len=102 instead",
    ),
    case(
        "checkpoints_resume",
        f"verl.{A}.checkpoint.save_contents=[hf_model]",
        says="save_contents lacks model",
        hint=f"'verl.{A}.checkpoint.save_contents=[model,hf_model]'",
        legal=(f"verl.{A}.checkpoint.save_contents=[model]",),
    ),
    case(
        "validation_only_validates",
        "verl.trainer.val_only=true",
        "trainer.validate_before=false",
        says="would train",
        hint="--set trainer.validate_before=true",
        legal=("verl.trainer.val_only=true",),
    ),
    case(
        "loggers_are_known",
        "trainer.logger=[console,file,wandbb]",
        says="no logger wandbb",
        hint="console, file, wandb",
        legal=("trainer.logger=[console,file,wandb]",),
    ),
]
