"""Keys of verl's that a person gives: which are refused, what is said of them, and what verl's dataclasses take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from flashrl_cli.config.layers import Origin
from flashrl_cli.config.spec import TrainerSpec
from flashrl_cli.errors import EnvironmentNotReady, Location, Problem
from flashrl_cli.verl import compose
from flashrl_cli.verl import compose as tree
from flashrl_cli.verl.dead_keys import DEAD_KEYS, IGNORED, REMOVED, dead_key
from flashrl_cli.verl.lint import keys
from flashrl_cli.verl.lint.keys import OWNED
from flashrl_cli.verl.overrides import Override, Places, overrides
from tests.specs import load_spec

PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))


A, R = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def found(preset: str, *sets: str, rollout: str | None = None):
    resolved = load_spec(preset, rollout=rollout, sets=sets)
    return keys.verbatim_key_problems(resolved, overrides(resolved, PLACES))


CASES = [
    (
        "no_forced_keys",
        "verl.++actor_rollout_ref.actor.imp_ratio=2",
        "`++` and `~`",
        "verl.actor_rollout_ref.actor.imp_ratio",
    ),
    (
        "no_dead_keys",
        "verl.reward_model.reward_manager=dapo",
        "not act on reward_model.reward_manager",
        "reward.manager",
    ),
    ("no_dead_keys", "verl.+reward_model.overlong_buffer.len=1", "not in verl's tree", "reward.overlong"),
    ("no_dead_keys", "verl.reward_model.enable=true", "legacy reward tree", "verl.reward.reward_model"),
    ("no_dead_keys", "verl.custom_reward_function.path=/x.py", "legacy", "verl.reward.custom_reward_function"),
    ("no_dead_keys", "verl.actor_rollout_ref.actor.imp_ratio_cap=2", "was a fork's key", "--tis CAP"),
    ("no_dead_keys", "verl.actor_rollout_ref.actor.grad_clip=1.0", "never read", "optim.clip_grad"),
    ("no_dead_keys", "verl.algorithm.filter_groups.max_num_gen_batches=10", "ignored", "max_inflight_batches"),
    ("no_owned_keys", "verl.data.train_batch_size=8", "verl's data.train_batch_size itself", "--set data.train_batch"),
    ("no_owned_keys", "verl.trainer.experiment_name=x", "sets verl's trainer.experiment_name", "--name"),
    ("no_owned_keys", "verl.trainer.device=cuda", "itself", "--set resources.platform"),
    ("no_owned_keys", "verl.algorithm.rollout_correction.rollout_is=token", "itself", "--tis"),
    ("no_owned_keys", "verl.+actor_rollout_ref.actor.strategy=fsdp", "is set twice", "drop it"),
    ("no_owned_keys", f"verl.{R}.logprobs_mode=raw_logprobs", "is set twice", "drop it"),
    ("no_forced_keys", "verl.~trainer.val_only=1", "`++` and `~`", "verl.trainer.val_only"),
    ("no_owned_keys", "verl.trainer.v1.trainer_mode=colocate_async", "itself", "--set trainer.mode"),
    ("no_owned_keys", f"verl.{R}.n_gpus_per_node=2", "itself", "--set resources.rollout_gpus_per_node"),
    ("no_dead_keys", f"verl.{R}.nnodes=1", "all engines share the trainer's GPUs", "trainer.mode=separate_async"),
    ("no_dead_keys", "verl.trainer.v1.colocate_async.num_warmup_batches=2", "is another one", "nothing in its place"),
    ("no_owned_keys", f"verl.+{R}.engine_kwargs.vllm.kv_cache_dtype=fp8", "itself", "--set rollout.kv_cache=fp8"),
    ("no_owned_keys", f"verl.+{R}.engine_kwargs.vllm.calculate_kv_scales=true", "itself", "drop it"),
    ("one_quantization", f"verl.{R}.quantization=torchao", "say it twice", "--rollout"),
    ("own_environment", "env.FLASHRL_PLUGIN_DIR=/x", "FLASHRL_PLUGIN_DIR is flashrl's own", "drop it"),
    ("own_environment", "env.VERL_FILE_LOGGER_PATH=/x", "VERL_FILE_LOGGER_PATH is flashrl's own", "drop it"),
    (
        "no_idle_options",
        "algorithm.kl_loss_coef=0.01",
        "algorithm.kl_loss_coef without",
        "--set algorithm.kl_loss=true",
    ),
    ("no_idle_options", "critic.lr=1e-5", "nothing reads critic.lr", "--set algorithm.advantage=gae"),
    ("no_owned_keys", f"verl.{A}.policy_loss.loss_mode=gspo", "itself", "--set algorithm.loss"),
    ("no_idle_options", "trainer.prefetch=2", "an asynchronous trainer.mode", "--set trainer.mode=separate_async"),
    ("no_idle_options", "algorithm.filter_groups.metric=acc", "nothing reads", "algorithm.filter_groups.enable=true"),
]


@pytest.mark.parametrize(("rule", "text", "part", "hint"), CASES)
def test_broken(rule, text, part, hint):
    problem = found("tiny", text)[0]
    assert part in problem.message
    assert hint in (problem.hint or "")
    assert str(problem.where).startswith(("--set ", "presets/"))


@pytest.mark.parametrize(
    "sets",
    [
        ("algorithm.kl_loss_coef=0.01", "algorithm.kl_loss=true"),
        ("algorithm.kl_loss_coef=0",),
        ("algorithm.filter_groups.enable=false",),
        ("critic.path=null",),
    ],
)
def test_an_option_that_is_read_or_says_nothing_is_let_through(sets):
    assert found("tiny", *sets) == []


@pytest.mark.parametrize(
    ("loss", "bound"),
    [("gpg", "clip_low"), ("sapo", "clip_high"), ("dro", "clip_high"), ("kl-cov", "clip_low"), ("gspo", "clip_c")],
)
def test_a_bound_that_a_loss_does_not_read_is_refused(loss, bound):
    given = f"algorithm.{bound}=1.5"
    (problem,) = found("tiny", f"algorithm.loss={loss}", given)
    assert problem.message == f"nothing reads algorithm.{bound} without algorithm.loss=ppo"
    assert found("tiny", "algorithm.loss=dppo-tv", given) == []


def test_a_preset_may_hold_values_for_a_switch_that_is_off():
    assert found("gsm8k-0.5b", "algorithm.advantage=grpo", "rollout.n=8") == []


@pytest.mark.parametrize("cap", ["2", "null"])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bypass_mode=true", "nothing is weighted, rejected or compared"),
        ("loss_type=reinforce", "only bypass mode has one"),
        ("rollout_rs=token_k1", "--set correction.reject.by=…"),
        ("rollout_is_batch_normalize=true", "a weight of 3.48 at a cap of 2 was measured"),
    ],
)
def test_verls_own_keys_of_the_correction_are_refused_with_and_without_weights(name, hint, cap):
    (problem,) = found("tiny", f"verl.algorithm.rollout_correction.{name}", f"correction.cap={cap}")
    assert hint in (problem.hint or "")


def test_verls_own_quantizations_are_free_in_bf16_but_fp8_has_its_switch():
    assert found("dapo-32b", f"verl.{R}.quantization=torchao") == []
    assert "say it twice" in found("dapo-32b", f"verl.{R}.quantization=fp8")[0].message
    assert "say it twice" in found("dapo-32b", f"verl.+{R}.engine_kwargs.vllm.quantization=x")[0].message


def test_every_rule_has_a_case():
    named = {rule for rule, *_ in CASES} | {"one_attention"}
    assert {rule.__name__ for rule in keys.RULES} == named


@pytest.fixture
def no_verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def compose(_: object) -> dict[str, object]:
        raise EnvironmentNotReady("no verl")

    monkeypatch.setattr(tree, "compose", compose)
    keys._living.cache_clear()
    yield
    keys._living.cache_clear()


@pytest.fixture
def small_verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tree, "compose", lambda _: {"ray_kwargs": {"timeline": None}, "data": {"shuffle": True}})
    keys._living.cache_clear()
    yield
    keys._living.cache_clear()


@pytest.mark.usefixtures("no_verl")
def test_what_is_known_without_verl():
    always = [dead for dead in DEAD_KEYS if not dead.modes and dead.key not in OWNED]
    assert all(OWNED[key] in found.hint for key in OWNED if (found := keys.translation(key)))
    assert all(dead.instead in found.hint for dead in always if (found := keys.translation(dead.key)))
    assert all(keys.translation(key) for key in [*OWNED, *(dead.key for dead in always)])
    assert keys.translation("data.shuffle") is None
    assert keys.translation("foo") is None


@pytest.mark.usefixtures("small_verl")
@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("data.shuffle", "keys of verl's own go under verl: --set verl.data.shuffle=…"),
        ("+data.shuffle", "keys of verl's own go under verl: --set verl.data.shuffle=…"),
        ("++verl.data.shuffle", "keys of verl's own go under verl: --set verl.data.shuffle=…"),
        ("+data.new", "--set verl.+data.new=… adds a key that verl's own tree lacks"),
        ("++trainer.nnodes", f"flashrl's way to set it: {OWNED['trainer.nnodes']}"),
        ("ray_kwarg.timeline", "did you mean verl's ray_kwargs.timeline? keys of verl's own go under verl: "),
        ("data.shufle", None),  # may as well be a misspelled key of flashrl's
        ("foo", None),
    ],
)
def test_translation(key, hint):
    found = keys.translation(key)
    assert (found is None) if hint is None else (found is not None and found.hint.startswith(hint))


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("reward_model.reward_manager", "reward_model.reward_manager"),
        ("reward_model.overlong_buffer.len", "reward_model.overlong_buffer"),
        ("reward_model.model.path", "reward_model.model.path"),
        ("reward_model.model.external_lib", "reward_model"),
        ("reward_model", "reward_model"),
        ("reward_models", None),
        ("reward.reward_model.enable", None),
        ("algorithm.rollout_is_level", "algorithm.rollout_is_level"),
        ("algorithm.rollout_correction.rollout_is", None),
        ("actor_rollout_ref.actor.optim.clip_grad", None),
        ("actor_rollout_ref.actor.clip_ratio", "actor_rollout_ref.actor.clip_ratio"),
        ("actor_rollout_ref.actor.clip_ratio_low", None),
        ("actor_rollout_ref.actor.fsdp_config.qat.enable", None),
        ("actor_rollout_ref.model.lora.merge", None),
        ("critic.model.lora.merge", "critic.model.lora"),
        ("ray_init.num_cpus", "ray_init"),
    ],
)
def test_lookup(key, entry):
    dead = dead_key(key)
    assert (dead.key if dead else None) == entry


MODES = get_args(TrainerSpec.model_fields["mode"].annotation)


def test_every_entry_is_found_and_no_key_has_two():
    for dead in DEAD_KEYS:
        assert all((dead_key(dead.key, mode) is dead) == (mode not in dead.modes) for mode in MODES)


def test_every_entry_says_why_and_what_instead():
    assert all(dead.why and dead.instead for dead in DEAD_KEYS)


@pytest.mark.parametrize("table", [IGNORED, REMOVED])
def test_the_tables_are_sorted(table):
    keys = [dead.key for dead in table]
    assert keys == sorted(set(keys))


FILES = {
    "base.py": "@dataclass\nclass Base(Mapping):\n    _target_: str = ''\n",
    "config/__init__.py": "from . import actor\nfrom .actor import *\nfrom .optim import OptimConfig as Optim\n",
    "config/actor.py": """
from typing import Optional
from verl.base import Base
from .optim import OptimConfig, Plain
from torch import Tensor
@dataclass
class ActorConfig(Base):
    lr: float = 1.0
    optim: Optional[OptimConfig] = None
    other: OptimConfig | None = None
    extra: dict[str, OptimConfig] = field(default_factory=dict)
    plain: Plain = None
    tensor: Tensor = None
@dataclass(frozen=True)
class FSDPActorConfig(ActorConfig):
    fsdp_size: int = -1
""",
    "config/optim.py": """
from ..base import Base
class Plain:
    x: int
@dataclass
class OptimConfig(Base):
    momentum: float = 0.9
""",
}


CACHES = (keys.find, keys._body, keys._text, keys._file, keys._root)


class Tree(compose.Tree):
    """`get` of a flat map."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def get(self, key: str) -> str | None:
        return self.values.get(key)


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    for name, text in FILES.items():
        file = tmp_path / "verl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(compose, "config_folder", lambda: tmp_path / "verl/trainer/config")
    for function in CACHES:
        function.cache_clear()
    yield
    for function in CACHES:
        function.cache_clear()


def judged(key: str, *, added: bool = True, target: str = "verl.config.FSDPActorConfig") -> list[Problem]:
    override = Override(key, 1, Origin("set", Location("--set", key=f"verl.+{key}")), added)
    return keys.added_key_problems([override], Tree(**{"a.actor._target_": target}))


@pytest.mark.parametrize(
    "key",
    [
        "a.actor.fsdp_size",
        "a.actor.lr",
        "a.actor._target_",
        "a.actor.optim.momentum",
        "a.actor.other.momentum",
        "a.actor.extra.anything.goes",
        "a.actor.plain.anything",
        "a.actor.tensor.anything",
        "a.actor.lr.deeper",
        "a.b.c",
        "top",
    ],
)
def test_accepted(key):
    assert judged(key) == []


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        (
            "a.actor.fsdp_sizes",
            "verl's FSDPActorConfig has no fsdp_sizes",
            "did you mean a.actor.fsdp_size? (its fields: verl/config/actor.py:15)",
        ),
        ("a.actor.momentum", "verl's FSDPActorConfig has no momentum", "its fields: verl/config/actor.py:15"),
        (
            "a.actor.optim.momentun",
            "verl's OptimConfig has no momentun",
            "did you mean a.actor.optim.momentum? (its fields: verl/config/optim.py:6)",
        ),
        ("a.actor.other.x.y", "verl's OptimConfig has no x", "its fields: verl/config/optim.py:6"),
    ],
)
def test_refused(key, message, hint):
    (problem,) = judged(key)
    assert (problem.message, str(problem.where), problem.hint) == (message, f"--set verl.+{key}", hint)


def test_only_added_keys_are_judged_and_nothing_is_read_without():
    assert judged("a.actor.nonsense", added=False) == []
    assert keys._text.cache_info().currsize == 0


@pytest.mark.parametrize("target", ["torch.nn.Linear", "verl.config.Missing", "verl.missing.ActorConfig", "Bare"])
def test_a_class_that_is_not_found_takes_any_name(target):
    assert judged("a.actor.nonsense", target=target) == []


def test_an_import_under_another_name():
    optim = keys.find("verl.config", "Optim")
    assert optim
    assert list(optim.fields) == ["_target_", "momentum"]
