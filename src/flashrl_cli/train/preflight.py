"""Preflight: check whether this machine can run a preset before anything starts, and report every problem at once.

`train` refuses to start if a check fails; `flashrl doctor --preset` shows the same findings and the successful ones.
The order is: software (`machine.software`), what the run computes on (Ray, sockets, GPUs, attention), what it reads
(data files, models, a smoothing profile), disk space for its checkpoints, its loggers, and finally the rows of its data
files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, hub, paths
from flashrl_cli.data import readers
from flashrl_cli.data.rows import BadRows, Needs, Scoring, faults, folded, judge
from flashrl_cli.data.writing import Types, rows_of
from flashrl_cli.errors import EnvironmentNotReady, InputError, Problem
from flashrl_cli.machine import gpus, ray_state, software, system
from flashrl_cli.machine.finding import Finding, Level, fail, ok, problems, warn
from flashrl_cli.memory import budget, estimate
from flashrl_cli.memory.model import shape_of
from flashrl_cli.precision import BLOCKS, PRECISIONS, largest_block
from flashrl_cli.text import counted
from flashrl_cli.train import rewards as own_reward
from flashrl_cli.verl import attention, environment, rewards
from flashrl_cli.verl.config import VALIDATION_LIMIT, VALIDATION_SAMPLES
from flashrl_cli.verl.overrides import AUTO, BACKEND, NCCL, SEPARATE, checkpoint_backend, data_path, model_path
from flashrl_cli.weights import Unreadable, Weights, read_json
from flashrl_cli.weights.contents import shapes
from flashrl_cli.weights.profile import Profile
from flashrl_cli.weights.shape import inputs, parameters

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.data.rows import Located
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.verl.compose import Tree
    from flashrl_cli.weights.shape import ModelShape

MOST_FIXES = 2
"""Number of fixes that the last line repeats, because some logs keep only that line."""


def check(plan: LaunchPlan) -> None:
    """Raise EnvironmentNotReady with every reason why this machine cannot run `plan`, InputError for rows alone."""
    found = list(problems(_machine(plan.spec)))
    if not found:
        return check_rows(plan)
    fixes = list(dict.fromkeys(problem.hint for problem in found if problem.hint))
    raise EnvironmentNotReady(
        f"this machine cannot run {plan.preset}: {', '.join(dict.fromkeys(str(problem.where) for problem in found))}",
        problems=[*found, *row_problems(plan.spec)],
        hint=f"{'; '.join(fixes[:MOST_FIXES])}; `flashrl doctor --preset` shows all that was checked, "
        "`--dry-run` the plan alone",
    )


def check_rows(plan: LaunchPlan) -> None:
    """Raise InputError if the rows of a data file that is on this machine cannot be trained on."""
    if rows := row_problems(plan.spec):
        raise InputError(
            f"{plan.preset} cannot be trained on these rows; nothing was started",
            problems=rows,
            hint="`flashrl prepare` writes rows whose truths verl's scorer pays for",
        )
    if wrong := own_reward.problems(plan.spec):
        raise InputError(
            f"{plan.preset} cannot be trained with this reward; nothing was started",
            problems=wrong,
            hint="correct it, then run the same command again",
        )


def findings(spec: RunSpec) -> Iterator[Finding]:
    """Yield a finding for each requirement of a run of `spec` on this machine, and for each type of invalid row."""
    yield from _machine(spec)
    for problem in (*row_problems(spec), *own_reward.problems(spec)):
        yield fail(str(problem.where or "rows"), problem.message, problem.hint)


def _machine(spec: RunSpec) -> Iterator[Finding]:
    versions = software.probe_versions()
    yield from software.missing(find_spec)
    yield from software.one_vllm(versions)
    yield from software.verl_version(versions)
    yield from software.vllm_version(versions)
    yield from software.stack_for(spec.resources.platform, versions)
    yield from software.entry_points(os.environ)
    yield from device_findings(spec, versions)
    yield from storage_findings(spec)
    yield from _loggers(spec)


def device_findings(spec: RunSpec, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield findings on the hardware that `spec` runs on; the GPUs of a Ray cluster cannot be seen from here."""
    joined = _cluster(spec)
    yield from _ray(spec, joined)
    yield from system.sockets(_environment(spec))
    yield from gpus.vendors(
        _environment(spec) | environment.worker_variables(spec.verl), spec.resources.gpus_per_node, preset=spec.env
    )
    if spec.resources.platform == "cpu":
        yield from system.cpu_lacks(spec.rollout.precision, spec.rollout.kv_cache)
    elif joined is None:
        found = gpus.seen()
        yield _enough_gpus(spec, len(found))
        yield from gpus.gpus_lack(spec.rollout.precision, found, spec.rollout.kv_cache)
        yield from gpus.driver(found, gpus.cuda_of(versions.get("torch", "")), compatible=gpus.COMPATIBLE.is_dir())
        if software.installed_stack(versions) is software.GPU:
            yield _attention(spec, found, versions)
            yield from _weight_updates(spec, versions)


def _environment(spec: RunSpec) -> dict[str, str]:
    """The environment of a run on this machine: that of this process, overridden by the preset's `env`."""
    return {**os.environ, **spec.env}


def _cluster(spec: RunSpec) -> tuple[str, str] | None:
    """The cluster that a run of `spec` joins, and the variable, key or file that names it."""
    joined = ray_state.probe_cluster(_environment(spec), environment.ray_arguments(spec.verl))
    if joined and joined[1] in spec.env:
        return joined[0], f"env.{joined[1]}"
    return joined


def _ray(spec: RunSpec, joined: tuple[str, str] | None) -> Iterator[Finding]:
    """Yield whether the run finds the Ray cluster that it joins, or can start its own."""
    arguments = environment.ray_arguments(spec.verl)
    if joined is None:
        yield ray_state.cluster(None, answers=None)
        yield from ray_state.folder_findings(_environment(spec), arguments)
        return
    answers = ray_state.probe_answers(joined[0])
    refused = [name for name in environment.REFUSED_ON_A_CLUSTER if arguments.get(name)]
    if answers is False or not refused:
        yield ray_state.cluster(joined, answers=answers)
    else:
        text = f"a run joins {joined[0]} ({joined[1]}), where Ray refuses {', '.join(refused)} of the preset"
        yield fail("Ray", text, "`train --executor ray` leaves them out, `RAY_ADDRESS=local` has a Ray of its own")


def _enough_gpus(spec: RunSpec, found: int) -> Finding:
    """Whether a machine with `found` GPUs and no cluster has as many as a run on GPUs requires."""
    asked = spec.resources
    wanted = f"{asked.nodes} x {asked.gpus_per_node} CUDA GPUs"
    if asked.separate_devices:
        wanted += f" for the trainer and {asked.rollout_nodes} x {asked.rollout_gpus_per_node} for the rollout"
    here = asked.nodes == 1 and asked.rollout_nodes in (None, 1)
    if here and found >= asked.all_devices:
        return ok("resources", f"{wanted} of {found}")
    other = "extend base/cpu with a small model"
    if asked.separate_devices and here and found >= asked.devices:
        other = "--set trainer.mode=colocate_async --set resources.rollout_gpus_per_node=null"
    return fail(
        "resources",
        f"it needs {wanted}; this machine has {found}",
        f"`--executor ray` on a cluster that has them, or {other}",
    )


def _attention(spec: RunSpec, found: Sequence[gpus.Gpu], versions: Mapping[str, str]) -> Finding:
    """Whether this machine has the attention of a run on GPUs.

    Transformers takes a kernel from the hub in place of flash-attn if the package `kernels` is installed
    (transformers/modeling_utils.py:1936).
    """
    used = list(dict.fromkeys(attention.of_spec(spec).values()))
    kernels = [name for name in used if name in (attention.FLASH, attention.VARLEN)]
    if kernels and (reason := gpus.outside(attention.GPUS, kernels[0], found)):
        return fail("attention", reason, "--set model.attention=sdpa")
    if attention.FLASH not in used or software.FLASH_ATTENTION in versions:
        return ok("attention", " and ".join(used))
    text = f"{attention.FLASH} needs the package {software.FLASH_ATTENTION}, which is not installed"
    if "kernels" in versions:
        return warn("attention", f"{text}; transformers fetches a kernel from the hub", software.BUILD_FLASH_ATTENTION)
    other = "" if attention.shares_sequences(spec) else "--set model.attention=auto, or "
    return fail("attention", text, f"{other}{software.BUILD_FLASH_ATTENTION}")


def _weight_updates(spec: RunSpec, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether the trainer can send weights to engines with GPUs of their own, if it must."""
    if spec.trainer.mode != SEPARATE or checkpoint_backend(spec) != NCCL:
        return
    found = software.nccl_engine(versions)
    if found.level is Level.OK:
        yield found
    else:
        other = f"--set verl.{BACKEND}={contract.CHECKPOINT_ENGINE[0]} (through main memory)"
        yield fail(found.name, found.text, f"{found.fix}, or {other}")


def storage_findings(spec: RunSpec) -> Iterator[Finding]:
    """Yield findings on the files and models that `spec` names, and on the disk space for its checkpoints."""
    here = local_inputs(spec)
    for key, path in here.items():
        if key == PROFILE:
            yield judge_profile(path, here.get("model.path"))
        elif path.exists():
            yield ok(key, str(path))
        else:
            yield fail(key, f"{path} does not exist", _how_to_make(path))
    yield from _hub_models(spec)
    yield from _checkpoints(spec)


PROFILE, ROTATION = "rollout.profile", "rollout.rotation"


def local_inputs(spec: RunSpec) -> dict[str, Path]:
    """Map spec keys to the files and folders on this machine that they name; hub ids are left out."""
    data_root = paths.data_root()
    named = {
        **_named("data.train", "train", spec.data.train_sets),
        **_named("data.val", "test", spec.data.val_sets),
        **{key: model_path(model, data_root) for key, model in _models(spec).items()},
    }
    if profile := environment.rollout_options(spec).profile:
        named[PROFILE] = profile
    return {key: Path(path) for key, path in named.items() if path.startswith("/")}


def _named(key: str, split: str, sets: Sequence[str]) -> dict[str, str]:
    """The files of a key's data sets; of several, each with the data set's name."""
    convert, root = data_path(split), paths.data_root()
    if len(sets) == 1:
        return {key: convert(sets[0], root)}
    return {f"{key} {name}": convert(name, root) for name in sets}


def vocabulary(spec: RunSpec) -> int | None:
    """Number of rows of the policy's embedding, from its config.json; None if the policy is not on this machine."""
    folder = local_inputs(spec).get("model.path")
    try:
        size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] if folder else None
    except (OSError, ValueError, KeyError):
        return None
    return size if isinstance(size, int) else None


def _models(spec: RunSpec) -> dict[str, str]:
    """Map spec keys to the models that they name, on this machine or on the hub."""
    critic = spec.critic.path if spec.algorithm.advantage == "gae" else None
    return {"model.path": spec.model.path} | ({"critic.path": critic} if critic else {})


def _how_to_make(path: Path) -> str:
    data_root = paths.data_root()
    if path.is_relative_to(data_root):
        return f"`flashrl prepare {path.relative_to(data_root).parts[0]}`"
    return "check the path"


def bring(spec: RunSpec) -> str:
    """How the policy of `spec` gets onto this machine."""
    here = local_inputs(spec).get("model.path")
    return _how_to_make(here) if here else f"`hf download {spec.model.path}`"


_MAKE_PROFILE = "`flashrl quantize MODEL --calibrate PARQUET` makes one, --set rollout.profile=null goes without"


def judge_profile(path: Path, model: Path | None) -> Finding:
    """Whether `path` is a smoothing profile that fits the HF folder `model` (None: on the hub, not compared).

    `model` is what training begins with. Smoothing preserves the output of any weights of that shape, so a profile of
    other weights helps less but does no harm.
    """
    if not path.is_file():
        return fail(PROFILE, f"{path} does not exist", _MAKE_PROFILE)
    try:
        profile = Profile.read(path)
    except Unreadable as error:
        return fail(PROFILE, str(error), _MAKE_PROFILE)
    text = f"{path}, of {profile.about.model}: {counted(len(profile.names), 'tensor')}"
    if model is None or not model.is_dir():
        return ok(PROFILE, text)
    try:
        unlike = profile.suits(read_json(model / "config.json")) or profile.fits(shapes(model))
        same = Weights(hf=model).fingerprint() == profile.about.fingerprint
    except Unreadable:
        return ok(PROFILE, text)  # not in safetensors: the profile's shapes are compared at each refit
    if unlike:
        return fail(PROFILE, f"{path} is of another model: {unlike}", _MAKE_PROFILE)
    return (
        ok(PROFILE, text)
        if same
        else warn(PROFILE, f"{text}, calibrated on other weights than those in {model}", _MAKE_PROFILE)
    )


def _hub_models(spec: RunSpec) -> Iterator[Finding]:
    """Yield findings on models from the hub: already in its cache, or to be downloaded."""
    cache, switch = hub.hub_cache(os.environ, Path.home()), hub.offline(os.environ)
    here = local_inputs(spec)
    for key, model in _models(spec).items():
        if key in here:
            continue
        if hub.is_cached(model, cache):
            yield ok(key, f"{model}, from {cache}")
        elif switch:
            yield fail(
                key, f"{model} is not in {cache}, and {switch} is set", f"unset {switch}, or copy the model there"
            )
        else:
            size = _parameters(model)
            free = shutil.disk_usage(paths.existing(cache)).free
            yield system.download(key, model, size and 2 * size, free, str(cache))


def _checkpoints(spec: RunSpec) -> Iterator[Finding]:
    size = _parameters(spec.model.path)
    if size is not None and not os.environ.get("RAY_ADDRESS"):
        root = paths.checkpoints_root()
        yield system.checkpoints(
            environment.checkpoint_bytes(spec, size),
            environment.checkpoints_kept(spec),
            shutil.disk_usage(paths.existing(root)).free,
            nodes=spec.resources.nodes,
            folder=str(root),
            keep_fewer=environment.KEEP_ONE,
        )


def _loggers(spec: RunSpec) -> Iterator[Finding]:
    names = tuple(dict.fromkeys(spec.trainer.logger))
    broken = list(
        environment.problems(names, _environment(spec), lambda module: find_spec(module) is not None, Path.home())
    )
    for problem in broken:
        yield fail(f"logger {problem.where}", problem.message, problem.hint)
    for name in environment.demanding(names):
        if name not in {problem.where for problem in broken}:
            yield ok(f"logger {name}", "ready")


DATA = ("data.train", "data.val")


def row_problems(spec: RunSpec) -> list[Problem]:
    """Problems in the rows of the data files on this machine, all of which are read.

    Rows for a dataset class that the preset names may have any form. Raises EnvironmentNotReady for a missing library.
    """
    if rewards.own_rows(spec.verl):
        return []
    reward = spec.reward
    own = (reward.function is not None and reward.sources is None) or rewards.own_reward(spec.verl)
    sources = reward.sources or () if reward.function is not None else ()
    scoring = Scoring.OWN if own else Scoring.VERL
    needs = Needs(scoring=scoring, own_sources=sources, prompt=rewards.prompt_column(spec.verl))
    here = local_inputs(spec)
    found: list[Problem] = []
    for file in dict.fromkeys(path for key, path in here.items() if key.startswith(DATA)):
        if file.exists():
            found += _problems_in(file, needs)
    return found


def shared_prompts(spec: RunSpec) -> Iterator[str]:
    """Yield how many prompts the data sets of a run share, apart from case and spaces, if it has several.

    `prepare` has reported those of a single data set. Rows for a dataset class that the preset names are not read.
    """
    sets = {"data.train": spec.data.train_sets, "data.val": spec.data.val_sets}
    if len({name for names in sets.values() for name in names}) == 1 or rewards.own_rows(spec.verl):
        return
    column, here = rewards.prompt_column(spec.verl), local_inputs(spec)
    prompts = {
        key: [_prompts(path, column) for name, path in here.items() if name.startswith(key) and path.exists()]
        for key in sets
    }
    trained = Counter(prompt for one in prompts["data.train"] for prompt in one)
    if twice := sum(count > 1 for count in trained.values()):
        yield f"{counted(twice, 'prompt')} of data.train {'is' if twice == 1 else 'are'} in several of its data sets"
    validated = {prompt for one in prompts["data.val"] for prompt in one}
    if shared := len(validated & trained.keys()):
        are = "is" if shared == 1 else "are"
        yield f"{shared:,} of {counted(len(validated), 'prompt')} of data.val {are} also trained on"


def _prompts(file: Path, column: str) -> set[str]:
    needs = Needs(scoring=Scoring.NONE, prompt=column)
    return {folded(row, column) for row in judge(readers.read_rows(file, needs, BadRows()), needs, BadRows())}


def _problems_in(file: Path, needs: Needs) -> list[Problem]:
    bad = BadRows()
    try:
        rows = judge(_uniform(readers.read_rows(file, needs, bad), needs, bad), needs, bad)
    except InputError as error:
        return [Problem(error.message, str(file), error.hint)]
    if not rows and not bad.count:
        return [Problem("holds no rows", str(file), "flashrl prepare writes rows as verl reads them")]
    return bad.problems()


def _uniform(located: Iterator[Located], needs: Needs, bad: BadRows) -> Iterator[Located]:
    """Yield the rows; JSON rows whose types Arrow could not combine with those of earlier rows also go to `bad`."""
    types = Types()
    for place, row in located:
        if not place.unit and not any(faults(row, needs)):  # a line of JSON; Parquet has one type for each column
            for fault in types.faults(place, row):
                bad.add(place, fault)
        yield place, row


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory that a run needs: an estimate for GPUs of a given size, or the reason why there is none."""

    gpu: str = ""
    """Where the GPU's size comes from."""
    estimate: estimate.Estimate | None = None
    unknown: str = ""

    @property
    def lines(self) -> list[str]:
        """Lines for a terminal or for the comments of a script."""
        if self.estimate is None:
            return [f"memory: not estimated, {self.unknown}"]
        return [f"memory of each GPU ({self.gpu}), estimated:", *estimate.block(self.estimate)]

    @property
    def warning(self) -> str | None:
        """A warning to show before a launch, if there is one."""
        if self.estimate is None or self.estimate.verdict == "fits":
            return None
        return "; ".join(estimate.summary(self.estimate))

    def document(self) -> dict[str, Any]:
        """The estimate as plain data, for `--json`."""
        if self.estimate is None:
            return {"unknown": self.unknown}
        return {"gpu": self.gpu, **estimate.document(self.estimate)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What a run validates, and when: `before` is the number of its first step, None if it does not start with it."""

    data: str
    prompts: int | None
    """Rows of the file, of which verl leaves out overlong ones if the preset says so; None if they are not known."""
    responses: int
    """Responses to a prompt."""
    before: int | None
    every: int | None
    """Steps between validations, of which the last step is one; None for none."""

    @property
    def size(self) -> str:
        """What one validation generates."""
        prompts = "all prompts" if self.prompts is None else counted(self.prompts, "prompt")
        several = f" x {self.responses} responses" if self.responses > 1 else ""
        return f"{prompts}{several} of {self.data}"

    @property
    def text(self) -> str:
        """A sentence for a terminal, or for the comments of a script."""
        times = [f"before step {self.before}"] if self.before is not None else []
        if self.every == 1:
            times += ["after every step"]
        elif self.every is not None:
            times += [f"every {self.every} steps", "after the last"]
        if not times:
            return "validation: none"
        return f"validation: {self.size} {', '.join(times[:-1])}{' and ' if times[1:] else ''}{times[-1]}"

    def document(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return asdict(self)


def validation_of(resolved: Resolved, tree: Tree, done: int = 0) -> Validation:
    """What a run validates that goes on from step `done`; reads the manifest or the size of its validation data."""
    spec = resolved.spec
    files = {name: Path(data_path("test")(name, paths.data_root())) for name in spec.data.val_sets}
    counts = [rows_of(path) if path.exists() else None for path in files.values()]
    rows, most = None if None in counts else sum(filter(None, counts)), tree.get(VALIDATION_LIMIT)
    return Validation(
        data=" and ".join(path.name if path.name in name else name for name, path in files.items()),
        prompts=min(rows, most) if rows is not None and isinstance(most, int) and most > 0 else rows,
        responses=tree.get(VALIDATION_SAMPLES),
        before=done + 1 if spec.trainer.validate_before else None,
        every=spec.trainer.validate_every if spec.trainer.validate_every > 0 else None,
    )


def memory_of(resolved: Resolved, tree: Tree, gpus: Sequence[int] = ()) -> Memory:
    """Memory of a run on `gpus` (bytes of each), on `resources.gpu_memory_gib`, or else on GPUs of 80 GB."""
    spec = resolved.spec
    if spec.resources.platform == "cpu":
        return Memory(unknown="it is estimated for GPUs only")
    try:
        policy, critic = model_shapes(spec)
        if policy is None:
            return Memory(unknown=f"no config.json of {spec.model.path} on this machine")
        size, source = gpu(spec, gpus)
        return Memory(gpu=source, estimate=estimate.estimate(resolved, tree, policy, critic, size))
    except ValueError as error:
        return Memory(unknown=str(error))


def model_shapes(spec: RunSpec) -> tuple[ModelShape | None, ModelShape | None]:
    """Shapes of the policy and of a critic with a model of its own, if files on this machine give them.

    Raises ValueError for a model that is not a plain decoder.
    """
    critic = spec.critic.path
    return shape_of(spec.model.path, paths.data_root()), shape_of(critic, paths.data_root()) if critic else None


def gpu(spec: RunSpec, gpus: Sequence[int]) -> tuple[int, str]:
    """Bytes of a GPU, and where that number comes from."""
    given = spec.resources.gpu_memory_gib
    if given is not None:
        return round(given * (1 << 30)), "resources.gpu_memory_gib"
    if gpus:
        return min(gpus), "this machine's"
    return estimate.H100_BYTES, "80 GB assumed"


def shape(model: str) -> ModelShape | None:
    """Shape of a model from files on this machine; None if they do not give it, or if the model is not a decoder."""
    with contextlib.suppress(ValueError):
        return shape_of(model, paths.data_root())
    return None


def with_attention(resolved: Resolved, *, here: bool = True) -> Resolved:
    """The preset with an attention in place of `auto`; `here` says that it is trained on this machine."""
    spec = resolved.spec
    return attention.decided(
        resolved,
        installed=here and software.has_flash_attention(),
        policy=shape(spec.model.path),
        critic=shape(spec.critic.path or spec.model.path),
    )


def with_rotation(resolved: Resolved) -> Resolved:
    """The preset with a block in place of `auto` for int8 rollouts, where a file here gives the model's sizes."""
    spec = resolved.spec
    if spec.rollout.rotation != AUTO or not PRECISIONS[spec.rollout.precision].rotates:
        return resolved
    if spec.rollout.profile is not None:
        return budget.decided(resolved, {ROTATION: budget.Choice("off", "rollout.profile is for unrotated channels")})
    found = shape(spec.model.path)
    if found is None:
        return resolved
    ranks = spec.rollout.tensor_parallel
    block = largest_block(inputs(found, ranks).values())
    where = "every input" if ranks == 1 else f"every input on each of {ranks} ranks"
    why = f"divides {where}" if block else f"no block of {BLOCKS[0]} or more divides {where}"
    return budget.decided(resolved, {ROTATION: budget.Choice(block or "off", why)})


def _parameters(model: str) -> int | None:
    """Number of parameters of a model, if its shape is known on this machine."""
    found = shape(model)
    return parameters(found).total if found else None


def gpu_memory(spec: RunSpec) -> list[int]:
    """Bytes of each GPU here; empty for a run on a CPU, or on a cluster, whose GPUs cannot be seen from here."""
    asked = spec.resources
    if asked.platform == "cpu" or asked.nodes > 1 or (asked.rollout_nodes or 1) > 1 or _cluster(spec):
        return []
    return [gpu.memory_mib << 20 for gpu in gpus.seen() if gpu.memory_mib]
