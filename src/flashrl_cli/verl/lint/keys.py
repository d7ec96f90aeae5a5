"""Rules on the verl keys that a user sets: their names, their owners and the types of their values.

Keys are refused if they have no effect, are set by flashrl itself, or have a value of the wrong type. Hydra cannot
check an added key (`+key`), but verl turns most nodes of its tree into the dataclass that their `_target_` names
(verl/utils/config.py, omega_conf_to_dataclass), where an unknown name ends the run in a worker, minutes after the
start. Added keys are therefore compared with the dataclasses in verl's source, which is parsed and not imported. Maps
(`dict`, `Any`, nodes without a class) accept any name.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING

from flashrl_cli.config.correction import BY_STD, CAPS_RATIO, CLIPS
from flashrl_cli.config.diagnose import Suggestion
from flashrl_cli.config.layers import leaves
from flashrl_cli.config.resolve import Resolved
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.precision import BY_METHOD, METAVAR
from flashrl_cli.verl import compose, environment
from flashrl_cli.verl.config import FIELDS, Settings
from flashrl_cli.verl.dead_keys import dead_key
from flashrl_cli.verl.overrides import (
    ACTOR,
    ATTENTION,
    AUTO,
    CORRECTION,
    ENGINE,
    HYBRID,
    LOSS_FIELD,
    LOSS_MODE,
    MODE,
    MODE_FIELD,
    MODEL,
    REF,
    ROLLOUT,
    SEPARATE,
    TABLE,
    V1,
    Override,
)

if TYPE_CHECKING:
    from pathlib import Path

Rule = Callable[[Resolved, Sequence[Override]], Iterator[Problem]]
_FIXED = "flashrl drives verl's V1 trainer with vLLM, and no other"
_APART = {
    "trainer.use_v1": _FIXED,
    MODE: f"--set {MODE_FIELD}=…",
    f"{V1}.colocate_async.num_warmup_batches": "--set trainer.prefetch=…",
    f"{V1}.separate_async.num_warmup_batches": "--set trainer.prefetch=…",
    f"{V1}.separate_async.parameter_sync_step": "--set algorithm.mini_batch_size=…, of which a step trains on each",
    HYBRID: "drop it: all rollout engines have GPUs of their own",
    f"{ROLLOUT}.name": _FIXED,
    "trainer.experiment_name": "--name",
    "trainer.default_local_dir": "--name, and trainer.project",
    "trainer.resume_mode": "--resume",
    "trainer.resume_from_path": "--resume",
    f"{ACTOR}.use_dynamic_bsz": "--set algorithm.max_tokens_per_gpu=…, or algorithm.micro_batch_size_per_gpu=…",
    f"{ROLLOUT}.log_prob_use_dynamic_bsz": "drop it: log-probs are batched as the policy update is",
    "critic.use_dynamic_bsz": "drop it: verl's critic always batches by tokens",
    "trainer.device": "--set resources.platform=…",
    f"{ENGINE}.kv_cache_dtype": "--set rollout.kv_cache=fp8",
    f"{ENGINE}.calculate_kv_scales": "drop it: --set rollout.kv_cache=fp8 makes scales at each weight update",
    f"{CORRECTION}.rollout_is": "--tis, or --set correction.kind=…",
    f"{CORRECTION}.rollout_is_threshold": "--tis, or --set correction.cap=…",
    f"{CORRECTION}.rollout_rs": "--set correction.reject.by=… and correction.reject.estimator=…",
    f"{CORRECTION}.rollout_rs_threshold": "--set correction.reject.upper=…, as an importance weight",
    f"{CORRECTION}.rollout_is_batch_normalize": (
        "drop it: verl divides by the mean weight after the cap, and a weight of 3.48 at a cap of 2 was measured"
        " (verl/trainer/ppo/rollout_corr_helper.py:650)"
    ),
    f"{CORRECTION}.bypass_mode": (
        "drop it: verl's V1 trainer then only takes the rollout's log-probs for its own; nothing is weighted, rejected"
        " or compared, and a rollout that does not sample from the policy is not found"
        " (verl/trainer/ppo/v1/trainer_base.py:1640, :1767)"
    ),
    f"{CORRECTION}.loss_type": "drop it: only bypass mode has one, which does not correct in verl's V1 trainer",
    LOSS_MODE: f"--set {LOSS_FIELD}=…",
}
OWNED = {entry.key: f"--set {entry.field}=…" for entry in TABLE} | _APART
"""Keys that flashrl itself gives to verl, and the option by which a user sets them."""


def verbatim_key_problems(resolved: Resolved, overrides: Sequence[Override]) -> list[Problem]:
    """All problems of the keys under `verl:` that can be found without verl's own tree."""
    return [problem for rule in RULES for problem in rule(resolved, overrides)]


def verbatim(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Override]:
    """Yield the overrides that come from the spec's `verl` map; they are the last ones."""
    yield from overrides[len(overrides) - len(resolved.spec.verl) :]


def is_forced(key: str) -> bool:
    """Whether a key, without one leading `+`, evades Hydra's check: `++key` accepts any name, `~key` deletes a key."""
    return key.startswith(("+", "~"))


def no_forced_keys(_: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """`++key` and `~key` are refused, because Hydra would accept a misspelled key."""
    for override in overrides:
        if is_forced(override.key):
            bare = override.key.lstrip("+~")
            message = f"`++` and `~` before a key of verl's are refused: {bare} would not be checked"
            yield Problem(message, override.origin.where, f"verl.{bare}, or verl.+{bare} for a new key")


def no_dead_keys(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """Keys without effect, which Hydra accepts, are refused; see `dead_keys`."""
    for override in overrides:
        dead = dead_key(override.key, resolved.spec.trainer.mode)
        if dead:
            yield Problem(
                f"verl does not act on {override.key}: {dead.why}", override.origin.where, f"use {dead.instead}"
            )


def no_owned_keys(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """A key that flashrl sets, or has a typed field for, may not be given under `verl:`; no key may be given twice."""
    counts = Counter(override.key for override in overrides)
    for override in verbatim(resolved, overrides):
        if dead_key(override.key, resolved.spec.trainer.mode):
            continue
        if override.key in OWNED:
            yield Problem(f"flashrl sets verl's {override.key} itself", override.origin.where, OWNED[override.key])
        elif counts[override.key] > 1:
            yield Problem(
                f"{override.key} is set twice", override.origin.where, "drop it, or the option that sets it too"
            )


def one_quantization(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """Only `rollout.precision` sets the rollout's precision.

    verl's own key would contradict flashrl's engine arguments, or its precision would not be verified.
    """
    for override in verbatim(resolved, overrides):
        if override.key == f"{ENGINE}.quantization" or (
            override.key == f"{ROLLOUT}.quantization"
            and (resolved.spec.rollout.precision in BY_METHOD or override.value == "fp8")
        ):
            yield Problem(
                f"{override.key} and rollout.precision = {resolved.spec.rollout.precision} say it twice",
                override.origin.where,
                f"--rollout {METAVAR} alone",
            )


def one_attention(resolved: Resolved, overrides: Sequence[Override]) -> Iterator[Problem]:
    """An implementation that `model.attention` cannot name may be given under `verl:`, but not beside that field."""
    chosen = resolved.origins["model.attention"].layer not in {"default", "derived"}
    for override in verbatim(resolved, overrides):
        if chosen and override.key.endswith(f".{ATTENTION}"):
            value = resolved.spec.model.attention
            message = f"{override.key} and model.attention = {value} say it twice"
            yield Problem(message, override.origin.where, f"drop it, or {resolved.option('model.attention', AUTO)}")


def own_environment(resolved: Resolved, _: Sequence[Override]) -> Iterator[Problem]:
    """A preset may not set the variables by which flashrl finds an attempt's files and verifies the precision."""
    for name in sorted(environment.OWNED & resolved.spec.env.keys()):
        yield Problem(f"{name} is flashrl's own", resolved.origins[f"env.{name}"].where, "drop it")


def no_idle_options(resolved: Resolved, _: Sequence[Override]) -> Iterator[Problem]:
    """An option given by `--set` must have an effect: the switch that makes verl read it must be on.

    Presets may hold values for switches that they leave off.
    """
    algorithm, mode = resolved.spec.algorithm, resolved.spec.trainer.mode
    readers = {
        "algorithm.kl_loss_coef": (algorithm.kl_loss, "algorithm.kl_loss=true"),
        "algorithm.kl_in_reward_coef": (algorithm.kl_in_reward, "algorithm.kl_in_reward=true"),
        "algorithm.normalize_by_std": (algorithm.advantage in (*BY_STD, "grpo-vectorized"), "algorithm.advantage=grpo"),
        "algorithm.clip_low": (algorithm.loss in CLIPS, "algorithm.loss=ppo"),
        "algorithm.clip_high": (algorithm.loss in CLIPS, "algorithm.loss=ppo"),
        "algorithm.clip_c": (algorithm.loss in CAPS_RATIO, "algorithm.loss=ppo"),
        "algorithm.filter_groups.": (algorithm.filter_groups.enable, "algorithm.filter_groups.enable=true"),
        "algorithm.filter_groups.max_inflight_batches": (mode == "sync", f"{MODE_FIELD}=sync"),
        "critic.": (algorithm.advantage == "gae", "algorithm.advantage=gae"),
    }
    ahead = ("trainer.prefetch", "trainer.max_staleness", "trainer.stale")
    readers |= dict.fromkeys(ahead, (mode != "sync", f"{MODE_FIELD}={SEPARATE}"))
    for field, origin in resolved.origins.items():
        if origin.layer != "set" or field == "algorithm.filter_groups.enable":
            continue
        for start, (read, switch) in readers.items():
            if field.startswith(start) and not read and _says_something(resolved.value(field)):
                needed = "an asynchronous trainer.mode" if field in ahead else switch
                way = resolved.option(*switch.split("="))
                yield Problem(f"nothing reads {field} without {needed}", origin.where, f"{way}, or drop it")


def _says_something(value: object) -> bool:
    """Whether a value asks for an effect: null does not, nor does a weight of 0, by which scripts switch a term off."""
    return value is False or value not in (0, None)


RULES: tuple[Rule, ...] = (
    no_forced_keys,
    no_dead_keys,
    no_owned_keys,
    one_quantization,
    one_attention,
    own_environment,
    no_idle_options,
)
SWITCHES = (
    f"{ACTOR}.fsdp_config.param_offload",
    f"{ACTOR}.fsdp_config.optimizer_offload",
    f"{ACTOR}.fsdp_config.offload_policy",
    f"{REF}.log_prob_use_dynamic_bsz",
    f"{MODEL}.lora.merge",
    f"{ROLLOUT}.calculate_log_probs",
    f"{ROLLOUT}.free_cache_engine",
    f"{ROLLOUT}.val_kwargs.do_sample",
    "critic.enable",
    "trainer.val_only",
)
NUMBERS = (
    f"{ACTOR}.ppo_micro_batch_size",
    f"{ACTOR}.ulysses_sequence_parallel_size",
    f"{ACTOR}.fsdp_config.fsdp_size",
    f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size",
    f"{REF}.log_prob_max_token_len_per_gpu",
    f"{REF}.log_prob_micro_batch_size_per_gpu",
    f"{MODEL}.lora_rank",
    f"{ROLLOUT}.agent.num_workers",
    f"{ROLLOUT}.data_parallel_size",
    f"{ROLLOUT}.val_kwargs.n",
    "critic.fsdp.fsdp_size",
    "critic.fsdp.ulysses_sequence_parallel_size",
    "critic.ppo_mini_batch_size",
    "data.gen_batch_size",
    "ray_kwargs.ray_init.num_cpus",
    "ray_kwargs.ray_init.num_gpus",
    "reward.num_workers",
)
"""Keys whose values the rules of this package compute with: SWITCHES are true or false, NUMBERS are integers.

Whether null is allowed is left to verl.
"""


def values_have_types(s: Settings) -> Iterator[Problem]:
    """Switches and numbers must have the right type: verl merges them into dataclasses or computes with them.

    The merge, at verl's start, is in utils/config.py:60.
    """
    for override in s.overrides:
        key, value = override.key, override.value
        if key in SWITCHES and not isinstance(value, bool | None):
            yield s.problem(f"verl.{key} should be true or false, not {value!r}", s.fix(key, True), key)
        elif key in NUMBERS and value is not None and s.size(key) is None:
            yield s.problem(
                f"verl.{key} should be a whole number, not {value!r}", "write a number, without quotes", key
            )


MAPS = frozenset({"reward", "global_profiler", "global_profiler.global_tool_config.nsys"})
"""Nodes with a `_target_` that V1 nevertheless reads as maps, so they may have names which the class lacks
(reward_loop/reward_manager/dapo.py:33).
"""


@dataclass(frozen=True, slots=True)
class Dataclass:
    """One of verl's dataclasses: its name, its `file:line` and its fields, inherited ones included."""

    name: str
    place: str
    fields: dict[str, tuple[str, ast.expr]]
    """Name of a field to the module that declares it, and its annotation."""


def added_key_problems(overrides: Sequence[Override], tree: compose.Tree) -> list[Problem]:
    """Problems of added keys that the dataclass of their node lacks; `tree` may already contain the overrides."""
    return [problem for override in overrides if override.added and (problem := _problem(override, tree))]


def _problem(override: Override, tree: compose.Tree) -> Problem | None:
    parts = override.key.split(".")
    owner: Dataclass | None = None
    for index, name in enumerate(parts):
        if owner and name not in owner.fields:
            return Problem(f"verl's {owner.name} has no {name}", override.origin.where, _hint(parts, index, owner))
        owner = _owner(".".join(parts[: index + 1]), name, owner, tree)
    return None


def _owner(key: str, name: str, parent: Dataclass | None, tree: compose.Tree) -> Dataclass | None:
    """The dataclass of the node at `key`: that of its `_target_`, else the type of its field in `parent`."""
    if key in MAPS:
        return None
    target = tree.get(f"{key}._target_")
    if isinstance(target, str):
        module, _, class_name = target.rpartition(".")
        return find(module, class_name)
    return _typed(*parent.fields[name]) if parent else None


def _hint(parts: Sequence[str], index: int, owner: Dataclass) -> str:
    near = get_close_matches(parts[index], sorted(owner.fields), n=2)
    names = " or ".join(".".join([*parts[:index], name]) for name in near)
    return f"did you mean {names}? (its fields: {owner.place})" if near else f"its fields: {owner.place}"


def _typed(module: str, annotation: ast.expr) -> Dataclass | None:
    """The dataclass X of an annotation `X`, `Optional[X]` or `X | None`; None for any other annotation."""
    match annotation:
        case ast.Name(id=name):
            return find(module, name)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _typed(module, inner)
        case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _typed(module, inner)
    return None


@cache
def find(module: str, name: str) -> Dataclass | None:
    """The dataclass that verl's `module` defines or imports as `name`; None if there is none or it is not verl's."""
    for node in _body(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _dataclass(module, node)
    imports = (node for node in _body(module) if isinstance(node, ast.ImportFrom))
    found = (find(*source) for node in imports for source in _sources(module, node, name))
    return next(filter(None, found), None)


def _dataclass(module: str, node: ast.ClassDef) -> Dataclass | None:
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    fields: dict[str, tuple[str, ast.expr]] = {}
    for base in reversed(node.bases):
        inherited = find(module, base.id) if isinstance(base, ast.Name) else None
        fields |= inherited.fields if inherited else {}
    own = (item for item in node.body if isinstance(item, ast.AnnAssign))
    fields |= {item.target.id: (module, item.annotation) for item in own if isinstance(item.target, ast.Name)}
    return Dataclass(node.name, f"{_file(module)}:{node.lineno}", fields)


def _sources(module: str, node: ast.ImportFrom, name: str) -> Iterator[tuple[str, str]]:
    """Yield the places from which an import may take `name`, as (module, name in that module)."""
    source = node.module or ""
    if node.level:
        file = _file(module)
        package = module.split(".") if file and file.name == "__init__.py" else module.split(".")[:-1]
        source = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
    for alias in node.names:
        if name == (alias.asname or alias.name):
            yield source, alias.name
        elif alias.name == "*" and f"class {name}" in _text(source):
            yield source, name


@cache
def _body(module: str) -> list[ast.stmt]:
    return ast.parse(_text(module)).body


@cache
def _text(module: str) -> str:
    """Source text of a verl module; empty for any other module."""
    file = _file(module)
    return (_root() / file).read_text(encoding="utf-8") if file else ""


@cache
def _file(module: str) -> Path | None:
    """File of a verl module, relative to the folder in which verl is installed; None for any other module."""
    path = _root().joinpath(*module.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((f.relative_to(_root()) for f in files if module.startswith("verl.") and f.is_file()), None)


@cache
def _root() -> Path:
    return compose.config_folder().parents[2]


def translation(key: str) -> Suggestion | None:
    """Hint for an unknown key that is a verl key, or similar to one; None for a key that verl lacks, too.

    Composes verl's tree, once per process, for keys that flashrl has no field for; without verl these are unknown.
    """
    bare = key.lstrip("+~").removeprefix("verl.").lstrip("+~")
    exact = _exact(bare)
    if exact is None and bare != key:
        return Suggestion(f"--set verl.+{bare}=… adds a key that verl's own tree lacks")
    if exact is None and bare.partition(".")[0] not in RunSpec.model_fields:
        near = get_close_matches(bare, sorted({*OWNED, *_living()}), n=1, cutoff=0.8)
        meant = _exact(near[0]) if near else None
        return meant and meant._replace(hint=f"did you mean verl's {near[0]}? {meant.hint}")
    return exact


def _exact(key: str) -> Suggestion | None:
    if key in OWNED:
        return Suggestion(f"flashrl's way to set it: {OWNED[key]}", [FIELDS.get(key, key)])
    dead = dead_key(key)
    if dead:
        return Suggestion(f"verl does not act on it ({dead.why}): use {dead.instead}", [dead.instead])
    return Suggestion(f"keys of verl's own go under verl: --set verl.{key}=…") if key in _living() else None


@functools.cache
def _living() -> frozenset[str]:
    try:
        return frozenset(key for key, _ in leaves(compose.compose([])))
    except EnvironmentNotReady:
        return frozenset()
