"""The launch plan: everything that a run will be started with, computed and printable before anything starts.

It is pure: it reads neither clock nor environment. `--dry-run` prints exactly what a launch executes, as one shell
script or as one document.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashrl_cli.paths import AttemptPaths, RunPaths
from flashrl_cli.precision import KV_CACHES, PRECISIONS
from flashrl_cli.reward_function import Reference, Source
from flashrl_cli.runs.store import PLAN_VERSION
from flashrl_cli.text import counted
from flashrl_cli.train.resume import FROM_NOTHING, Resume
from flashrl_cli.verl.environment import run_environment
from flashrl_cli.verl.overrides import ATTENTION, Override, Places, by_theme, overrides, quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from flashrl_cli.config.layers import Origin
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.verl.lint import Composition

ENTRY_POINT = "verl.trainer.main_ppo"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """One attempt of one run. `env` holds the variables added to the environment; `cwd` is the attempt's folder."""

    name: str
    resolved: Resolved
    attempt: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    overrides: tuple[Override, ...]
    paths: RunPaths
    attempt_paths: AttemptPaths
    resume: Resume = FROM_NOTHING
    reward: Source | None = None
    """The file with the run's own reward function."""
    composed: Composition | None = field(default=None, compare=False, repr=False)
    """verl's configuration of these overrides but for some values, where it was composed to find these values."""

    @property
    def spec(self) -> RunSpec:
        """The preset's values."""
        return self.resolved.spec

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self.resolved.spec.name

    @property
    def origins(self) -> Mapping[str, Origin]:
        """Where each value comes from."""
        return self.resolved.origins

    @property
    def is_finished(self) -> bool:
        """Whether the run has already done all its steps, if `trainer.steps` gives their number."""
        steps, done = self.spec.trainer.steps, self.resume.step
        return steps is not None and done is not None and done >= steps


def default_name(preset: str, spec: RunSpec) -> str:
    """Default name of a run: preset, precision, other rollout options, correction (such as `tiny-int8-kv8-tis2`)."""
    rollout, correction = spec.rollout, spec.correction
    parts = {
        **{cache.suffix: rollout.kv_cache == name for name, cache in KV_CACHES.items()},
        "head32": rollout.lm_head_fp32,
        "smooth": rollout.profile is not None,
        "plain": rollout.rotation == "off" and rollout.profile is None and PRECISIONS[rollout.precision].rotates,
        f"rot{rollout.rotation}": isinstance(rollout.rotation, int),
        f"mix{rollout.mix:g}": rollout.mix > 0,
        f"{correction.kind.replace('-', '')}{correction.cap or 0:g}": correction.kind != "none",
        "reject": correction.reject is not None,
    }
    return "-".join((preset, rollout.precision, *(part for part, applies in parts.items() if applies)))


def run_paths(name: str, spec: RunSpec, runs_root: Path, checkpoints_root: Path) -> RunPaths:
    """Folders of a run of that name; its checkpoints are grouped by project."""
    return RunPaths(name, runs_root / name, checkpoints_root / spec.trainer.project / name)


def build_plan(
    resolved: Resolved,
    *,
    name: str,
    attempt: int,
    python: str | Path,
    runs_root: Path,
    checkpoints_root: Path,
    data_root: Path,
    resume: Resume = FROM_NOTHING,
    logging: str | None = None,
    cores: int | None = None,
    reward: Source | None = None,
    composed: Composition | None = None,
) -> LaunchPlan:
    """Plan an attempt of run `name` that continues from `resume`; roots are absolute, `logging` is for the plugins.

    `cores` is the number that a run on CPUs may use, None if the environment says how many threads it has. `reward` is
    the file with the run's own reward function.
    """
    spec = resolved.spec
    run = run_paths(name, spec, runs_root, checkpoints_root)
    files = run.attempt(attempt)
    places = Places(name=name, data=data_root, checkpoints=run.checkpoints, resume_from=resume.folder)
    given = overrides(resolved, places)
    return LaunchPlan(
        name=name,
        resolved=resolved,
        attempt=attempt,
        argv=(str(python), "-m", ENTRY_POINT, *map(str, given), *_hydra_settings(files)),
        env=run_environment(spec, files, logging=logging, cores=cores),
        cwd=files.root,
        overrides=given,
        paths=run,
        attempt_paths=files,
        resume=resume,
        reward=reward,
        composed=composed,
    )


def plan_document(plan: LaunchPlan) -> dict[str, Any]:
    """The plan as plain data, as printed by `--dry-run --json` and stored in `plan.json`."""
    return {
        "schema_version": PLAN_VERSION,
        "preset": plan.preset,
        "name": plan.name,
        "attempt": plan.attempt,
        "argv": list(plan.argv),
        "env": dict(plan.env),
        "cwd": str(plan.cwd),
        "overrides": [str(override) for override in plan.overrides],
        "files": _files(plan),
        "reward": reward_document(plan),
        "resume": {
            "from": plan.resume.folder and str(plan.resume.folder),
            "set_aside": {str(path): why for path, why in plan.resume.superseded},
        },
        "spec": plan.spec.model_dump(mode="json"),
        "origins": {key: str(origin) for key, origin in plan.origins.items()},
    }


def reward_document(plan: LaunchPlan) -> dict[str, str] | None:
    """The run's own reward function as plain data: its name, and the SHA-256 of its file; None without one."""
    if plan.reward is None:
        return None
    return {"function": str(plan.spec.reward.function), "sha256": plan.reward.sha256}


def _files(plan: LaunchPlan) -> dict[str, str]:
    attempt = plan.attempt_paths
    return {
        "run": str(plan.paths.root),
        "attempt": str(attempt.root),
        "log": str(attempt.log),
        "metrics": str(attempt.metrics),
        "plugins": str(attempt.plugins),
        "plan": str(attempt.plan),
        "checkpoints": str(plan.paths.checkpoints),
    }


def _hydra_settings(files: AttemptPaths) -> tuple[str, ...]:
    """Hydra's own settings: without them it creates an `outputs/` folder; its log goes to the attempt's folder."""
    return (f"hydra.run.dir={quote(str(files.root / 'hydra'))}", "hydra.output_subdir=null")


def plan_script(plan: LaunchPlan, remarks: Sequence[str] = (), *, submission: Sequence[str] = ()) -> str:
    """The plan as a POSIX shell script: overrides by theme, environment, files; `remarks` are comments at its top.

    It runs what a launch runs, without the supervision; overrides are in another order, which is equivalent for Hydra.
    With the lines of a `submission`, which take the overrides as `$@`, the script ends with them and leaves the
    environment to the job.
    """
    attempt = plan.attempt_paths
    lines = [
        "#!/bin/sh",
        *_comments(_head(plan)),
        *_comments(remarks),
        "set -eu",
        *([] if submission else _environment(plan)),
        *_arguments(plan),
        "",
        *_comments([f"log: {attempt.log}", f"metrics: {attempt.metrics}", f"checkpoints: {plan.paths.checkpoints}"]),
        f"mkdir -p {shlex.quote(str(attempt.plugins))}",
        *_reward(plan),
        *(submission or _execution(plan)),
    ]
    return "\n".join(lines) + "\n"


def _reward(plan: LaunchPlan) -> Iterator[str]:
    """The copy of the reward function that the run calls, for which it makes no other preparation."""
    if plan.reward:
        file = Reference.parse(plan.spec.reward.function or "").file
        yield shlex.join(["cp", str(file), str(plan.attempt_paths.reward)])


def _head(plan: LaunchPlan) -> Iterator[str]:
    spec = plan.spec
    yield f"flashrl preset {plan.preset}, run {plan.name}, attempt {plan.attempt}"
    loss = f" with loss {spec.algorithm.loss}" if spec.algorithm.loss != "ppo" else ""
    algorithm = f"{spec.algorithm.advantage}{loss}"
    yield f"{spec.model.path}, {algorithm}, {spec.rollout.precision} rollouts, {spec.correction.text}"
    trainer = spec.trainer
    if trainer.mode != "sync":
        ahead = counted(math.floor(trainer.prefetch * spec.data.train_batch_size), "prompt")
        steps = counted(trainer.max_staleness, "step")
        late = f"groups older than {steps} are dropped"
        if trainer.stale == "wait":
            late = f"groups that reach {steps} are waited for"
        yield f"{trainer.mode}: {ahead} sampled ahead (trainer.prefetch = {trainer.prefetch:g}), {late}"
    if PRECISIONS[spec.rollout.precision].rotates:
        yield f"rotation of inputs: {spec.rollout.rotation} ({plan.origins['rollout.rotation']})"
    used = [f"{one.value} ({one.origin})" for one in plan.overrides if one.key.endswith(f".{ATTENTION}")]
    if used:
        yield f"attention in training: {', '.join(dict.fromkeys(used))}"


def _comments(texts: Sequence[str] | Iterator[str]) -> Iterator[str]:
    for text in texts:
        yield from (f"# {line}" for line in text.split("\n"))


def _environment(plan: LaunchPlan) -> Iterator[str]:
    yield from ("", "# environment")
    yield from (f"export {key}={shlex.quote(value)}" for key, value in plan.env.items())


def _arguments(plan: LaunchPlan) -> Iterator[str]:
    groups = {theme: [str(override) for override in group] for theme, group in by_theme(plan.overrides).items()}
    groups["Hydra"] = list(plan.argv[3 + len(plan.overrides) :])
    start = "set --"
    for theme, words in groups.items():
        yield from ("", f"# {theme}")
        yield " \\\n  ".join([start, *map(_quoted, words)])
        start = 'set -- "$@"'


def _execution(plan: LaunchPlan) -> Iterator[str]:
    yield f"cd {shlex.quote(str(plan.cwd))}"
    yield f'exec {shlex.join(plan.argv[:3])} "$@"'


def _quoted(word: str) -> str:
    """Quote `word` like `shlex.quote`, but readably where it contains Hydra's own quotes."""
    return f'"{word}"' if "'" in word and not set(word) & set('$`"\\!') else shlex.quote(word)
