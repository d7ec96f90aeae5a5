"""Rules on the trainer: losses, importance correction, critic, rewards, checkpoints, validation and loggers.

Each reports what verl would refuse late, or do otherwise than the configuration suggests. Cited lines are verl 0.9.1's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.contract import MIXTURE
from flashrl_cli.verl.environment import LOGGERS
from flashrl_cli.verl.overrides import ACTOR, DATASET, LOSS_FIELD, OVERLONG, ROLLOUT, SEPARATE, V1

if TYPE_CHECKING:
    from flashrl_cli.errors import Problem
    from flashrl_cli.verl.config import Rule, Settings

REPORTED = ("reward", "score", "acc", "overlong_reward", "overlong")
"""Fields that verl's own reward functions and managers report (experimental/reward_loop/reward_manager/,
utils/reward_score/).
"""
REWARD_FUNCTION = "reward.custom_reward_function.path"
WARMUP = f"{ACTOR}.optim.lr_warmup_steps"
_DISTILLS = "distillation.enabled"


def dro_has_its_weight(s: Settings) -> Iterator[Problem]:
    """DRO without a positive weight of its penalty ends the run in its first update.

    See trainer/ppo/core_algos.py:2029.
    """
    weight = f"{ACTOR}.policy_loss.dro_beta"
    if s.spec.algorithm.loss == "dro" and not (s.get(weight) or 0) > 0:
        yield s.problem(f"the loss dro needs a positive verl.{weight}", s.fix(weight, 0.1), weight, LOSS_FIELD)


def critic_follows_advantage(s: Settings) -> Iterator[Problem]:
    """GAE fails without a critic's values; with another advantage a critic would be trained without being used.

    See trainer/ppo/utils.py:96.
    """
    key, advantage = "critic.enable", s.spec.algorithm.advantage
    if s.get(key) is not None and bool(s.get(key)) != (advantage == "gae"):
        yield s.problem(
            f"verl.{key} = {s.get(key)} contradicts algorithm.advantage = {advantage}",
            "drop it: algorithm.advantage decides",
            key,
        )


def shares_reach_the_data_set(s: Settings) -> Iterator[Problem]:
    """A data set class of the user's takes the place of the one that reads the shares (plugins/mixture.py)."""
    if s.spec.data.shares is not None and s.get(DATASET) != MIXTURE[0]:
        yield s.problem(f"verl.{DATASET} takes the place of the class that mixes by data.shares", "drop one", DATASET)


def metric_is_reported(s: Settings) -> Iterator[Problem]:
    """Dynamic sampling ends the run if the reward does not report its metric (trainer/ppo/v1/replay_buffer.py:304).

    A user's reward function or manager may report any field; the manager `rate_limited` is made for such a function.
    """
    groups, key = s.spec.algorithm.filter_groups, "algorithm.filter_groups.metric"
    own = s.get(REWARD_FUNCTION) or s.get("reward.reward_manager.source") != "register"
    if not groups.enable or own or s.spec.reward.manager == "rate_limited" or groups.metric in REPORTED:
        return
    yield s.problem(f"no reward of verl's reports {groups.metric}", _instead(s, key, groups.metric, REPORTED), key)


def rewards_come_in_time(s: Settings) -> Iterator[Problem]:
    """A reward model on the trainer's devices scores between sampling and training.

    That is too late for dynamic sampling, which needs the rewards (trainer/ppo/v1/trainer_base.py:200), and
    impossible while engines with devices of their own go on sampling (trainer_separate_async.py:74). verl refuses both
    in a worker.
    """
    model, pool = "reward.reward_model.enable", "reward.reward_model.enable_resource_pool"
    if not s.get(model) or s.get(pool):
        return
    for asked, why in (
        (s.spec.algorithm.filter_groups.enable, "dynamic sampling needs the reward while it samples"),
        (s.spec.trainer.mode == SEPARATE, f"with trainer.mode={SEPARATE} the trainer's devices never wait for it"),
    ):
        if asked:
            yield s.problem(f"{why}: the reward model needs devices of its own", s.fix(pool, True), model)
            return


def teacher_exists(s: Settings) -> Iterator[Problem]:
    """Distillation needs separate devices and a teacher model on them.

    Without these the run ends in a worker, after Ray has started (trainer/ppo/v1/trainer_base.py:839,
    workers/config/distillation.py:164-168). verl drops the entry `teacher_model` if there are other teachers (:308).
    """
    if not s.get(_DISTILLS):
        return
    for name in ("nnodes", "n_gpus_per_node"):
        key = f"distillation.{name}"
        if (s.size(key) or 0) < 1:
            yield s.problem(f"distillation without devices: verl.{key} = {s.get(key)}", s.fix(key, 1), key, _DISTILLS)
    teachers = dict(s.get("distillation.teacher_models") or {})
    if len(teachers) > 1:
        teachers.pop("teacher_model", None)
    for name, teacher in teachers.items():
        alone = name == "teacher_model"
        for field in ("model_path",) if alone else ("model_path", "key"):
            key = f"distillation.teacher_models.{name}.{field}"
            if not teacher.get(field):
                new = "" if alone else "+"
                yield s.problem(
                    f"distillation without a teacher: verl.{key} is not set", f"set verl.{new}{key}", key, _DISTILLS
                )


def reward_model_exists(s: Settings) -> Iterator[Problem]:
    """A reward model needs a path, and its resource pool needs devices.

    Each reward worker loads the model's tokenizer (experimental/reward_loop/reward_loop.py:128); the pool is created in
    trainer/ppo/v1/trainer_base.py:826.
    """
    enable, path, pool = (f"reward.reward_model.{name}" for name in ("enable", "model_path", "enable_resource_pool"))
    nodes = "reward.reward_model.nnodes"
    if s.get(enable) and not s.get(path):
        yield s.problem(f"a reward model without a path: verl.{path} is not set", f"set verl.{path}", path, enable)
    if s.get(pool) and (s.size(nodes) or 0) < 1:
        yield s.problem(f"verl.{pool} without devices: verl.{nodes} = {s.get(nodes)}", s.fix(nodes, 1), nodes, pool)


def workers_exist(s: Settings) -> Iterator[Problem]:
    """A run needs at least one agent loop worker and one reward worker.

    A batch is split over the agent loop workers (trainer/ppo/v1/agent_loop_tq.py:251), and reward workers score it.
    """
    for key in (f"{ROLLOUT}.agent.num_workers", "reward.num_workers"):
        if (s.size(key) or 0) < 1:
            yield s.problem(f"verl.{key} = {s.get(key)}: at least one has to work", s.fix(key, 1), key)


def reward_function_is_there(s: Settings) -> Iterator[Problem]:
    """The file of a reward function must exist and be given by an absolute path.

    Each reward worker loads it, and the workers' working folder is another one (utils/import_utils.py:179). Whether the
    path exists can be checked only for a run on this machine.
    """
    given = s.get(REWARD_FUNCTION)
    if not given or str(given).startswith("pkg://"):
        return
    path = Path(str(given).removeprefix("file://"))
    if not path.is_absolute():
        absolute = str(Path.cwd() / path)
        yield s.problem(
            f"verl.{REWARD_FUNCTION} = {given} is not absolute", s.fix(REWARD_FUNCTION, absolute), REWARD_FUNCTION
        )
    elif s.spec.resources.nodes == 1 and not os.environ.get("RAY_ADDRESS") and not path.exists():
        yield s.problem(f"there is no {path}", "the path of a Python file, or pkg://MODULE", REWARD_FUNCTION)


def overlong_is_typed(s: Settings) -> Iterator[Problem]:
    """The overlong penalty needs five keys that agree, or it fails in a worker.

    See experimental/reward_loop/reward_manager/dapo.py:33-48; the field `reward.overlong` sets all of them.
    """
    enable = f"{OVERLONG}.enable"
    if s.get(enable) and s.spec.reward.overlong is None:
        manager = "" if s.spec.reward.manager == "dapo" else f"{s.option('reward.manager', 'dapo')} "
        buffer = s.option("reward.overlong.buffer_len", max(s.spec.data.max_response_length // 5, 1))
        hint = f"{manager}{buffer} instead"
        yield s.problem(f"verl.{enable} alone is not enough", hint, enable)


def checkpoints_resume(s: Settings) -> Iterator[Problem]:
    """A run that resumes without loading the weights would continue at its step with those of the base model.

    See utils/checkpoint/fsdp_checkpoint_manager.py:203 and trainer/ppo/v1/trainer_base.py:879.
    """
    for model in (ACTOR, *(["critic"] if s.has_critic else [])):
        for name in ("save_contents", "load_contents"):
            key = f"{model}.checkpoint.{name}"
            contents = s.get(key) or []
            if s.spec.trainer.save_every > 0 and "model" not in contents and s.where(key):
                yield s.problem(
                    f"verl.{key} lacks model: a run that goes on would start over from its first weights",
                    s.fix(key, ["model", *contents]),
                    key,
                )


def validation_only_validates(s: Settings) -> Iterator[Problem]:
    """verl reads `val_only` only after a validation before training; without that validation it trains.

    See trainer/ppo/v1/trainer_base.py:446.
    """
    key = "trainer.val_only"
    if s.get(key) and not s.spec.trainer.validate_before:
        yield s.problem(
            f"verl.{key} without trainer.validate_before would train",
            s.option("trainer.validate_before", True),
            key,
            "trainer.val_before_train",
        )


def loggers_are_known(s: Settings) -> Iterator[Problem]:
    """An unknown logger ends the run after all models are loaded (utils/tracking.py:71)."""
    for name in s.spec.trainer.logger:
        if name not in LOGGERS:
            yield s.problem(f"verl has no logger {name}", f"verl's are {', '.join(LOGGERS)}", "trainer.logger")


def _instead(s: Settings, key: str, given: object, names: tuple[str, ...]) -> str:
    """Hint for an unknown name: the option with the name that was probably meant, or all names."""
    near = get_close_matches(str(given), names, n=1)
    return s.fix(key, near[0]) if near else f"one of {', '.join(names)}"


def notes(s: Settings) -> list[str]:
    """Notes, in sentences, on what the trainer will do otherwise than in mode sync."""
    updates = s.size(f"{V1}.{SEPARATE}.parameter_sync_step") or 1
    warmup = s.size(WARMUP) or 0
    if s.spec.trainer.mode != SEPARATE or updates == 1 or warmup <= 0:
        return []
    counted = f"in mode {SEPARATE} verl counts mini-batches, {updates} a step"
    return [f"{WARMUP} = {warmup}: {counted}, so that the learning rate rises for {warmup / updates:g} steps"]


RULES: tuple[Rule, ...] = (
    dro_has_its_weight,
    critic_follows_advantage,
    shares_reach_the_data_set,
    metric_is_reported,
    rewards_come_in_time,
    teacher_exists,
    reward_model_exists,
    workers_exist,
    reward_function_is_there,
    overlong_is_typed,
    checkpoints_resume,
    validation_only_validates,
    loggers_are_known,
)
