"""Mistakes in what the trainer does."""

from __future__ import annotations

from tests.contract.demands_case import A, case

LEARNING = [
    case(
        "dro_has_its_weight",
        "algorithm.loss=dro",
        says="needs a positive",
        hint=f"{A}.policy_loss.dro_beta=0.1",
        legal=("algorithm.loss=dro", f"verl.{A}.policy_loss.dro_beta=0.1"),
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
        "filter_sees_rewards",
        "verl.reward.reward_model.enable=true",
        says="devices of its own",
        hint="verl.reward.reward_model.enable_resource_pool=true",
        preset="dapo-32b",
    ),
    case(
        "teacher_exists",
        "verl.distillation.enabled=true",
        "verl.distillation.teacher_models.teacher_model.model_path=Qwen/Qwen3-4B",
        says="distillation without devices: verl.distillation.nnodes = 0",
        hint="--set verl.distillation.nnodes=1",
        legal=(
            "verl.distillation.enabled=true",
            "verl.distillation.nnodes=1",
            "verl.distillation.teacher_models.teacher_model.model_path=Qwen/Qwen3-4B",
        ),
    ),
    case(
        "teacher_exists",
        "verl.distillation.enabled=true",
        "verl.distillation.nnodes=1",
        says="without a teacher: verl.distillation.teacher_models.teacher_model.model_path",
        hint="set verl.distillation.teacher_models.teacher_model.model_path",
    ),
    case(
        "teacher_exists",
        "verl.distillation.enabled=true",
        "verl.distillation.nnodes=1",
        "verl.distillation.teacher_models.teacher_model.model_path=Qwen/Qwen3-4B",
        "verl.+distillation.teacher_models.other.model_path=Qwen/Qwen3-8B",
        says="verl.distillation.teacher_models.other.key is not set",
        hint="set verl.+distillation.teacher_models.other.key",
        legal=(
            "verl.distillation.enabled=true",
            "verl.distillation.nnodes=1",
            "verl.+distillation.teacher_models.other.model_path=Qwen/Qwen3-8B",
            "verl.+distillation.teacher_models.other.key=math",
        ),
    ),
    case(
        "reward_model_exists",
        "verl.reward.reward_model.enable=true",
        says="without a path: verl.reward.reward_model.model_path",
        hint="set verl.reward.reward_model.model_path",
        legal=("verl.reward.reward_model.enable=true", "verl.reward.reward_model.model_path=/model"),
    ),
    case(
        "reward_model_exists",
        "verl.reward.reward_model.enable_resource_pool=true",
        says="without devices: verl.reward.reward_model.nnodes = 0",
        hint="verl.reward.reward_model.nnodes=1",
        legal=("verl.reward.reward_model.enable_resource_pool=true", "verl.reward.reward_model.nnodes=1"),
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
