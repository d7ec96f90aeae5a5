"""Does a run find the GPUs, the precision and the attention that it asks for?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flashrl_cli.doctor import gpus, ray_state, software, system
from flashrl_cli.doctor.finding import Finding, fail, ok
from flashrl_cli.doctor.stacks import GPU, installed_stack
from flashrl_cli.verl import cluster, needs

if TYPE_CHECKING:
    from flashrl_cli.config.spec import ResourceSpec, RunSpec


def findings(spec: RunSpec, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield how this machine stands to what `spec` computes on; the GPUs of a Ray cluster cannot be seen from here."""
    joined = _cluster(spec)
    yield from _ray(spec, joined)
    yield from system.sockets(_environment(spec))
    yield from gpus.vendors(
        _environment(spec) | cluster.worker_variables(spec.verl), spec.resources.gpus_per_node, preset=spec.env
    )
    if spec.resources.platform == "cpu":
        yield from system.cpu_lacks(spec.rollout.precision, kv8=spec.rollout.kv_cache != "auto")
    elif joined is None:
        found = gpus.seen()
        yield from enough(spec.resources, len(found))
        yield from _gpu_precision(spec, found)
        yield from gpus.driver(found, gpus.cuda_of(versions.get("torch", "")), compatible=gpus.COMPATIBLE.is_dir())
        if installed_stack(versions) is GPU:
            yield attention(spec, versions)


def _environment(spec: RunSpec) -> dict[str, str]:
    """The environment of a run here: this process's, and the preset's `env` over it."""
    return {**os.environ, **spec.env}


def _cluster(spec: RunSpec) -> tuple[str, str] | None:
    """The cluster that a run of `spec` joins, and the variable, key or file that says so."""
    joined = ray_state.probe_cluster(_environment(spec), cluster.ray_arguments(spec.verl))
    if joined and joined[1] in spec.env:
        return joined[0], f"env.{joined[1]}"
    return joined


def _ray(spec: RunSpec, joined: tuple[str, str] | None) -> Iterator[Finding]:
    """Yield whether the run finds the Ray that it joins, or can start its own."""
    arguments = cluster.ray_arguments(spec.verl)
    if joined is None:
        yield ray_state.cluster(None, answers=None)
        yield from ray_state.folder_findings(_environment(spec), arguments)
        return
    answers = ray_state.probe_answers(joined[0])
    refused = [name for name in cluster.REFUSED_ON_A_CLUSTER if arguments.get(name)]
    if answers is False or not refused:
        yield ray_state.cluster(joined, answers=answers)
    else:
        text = f"a run joins {joined[0]} ({joined[1]}), where Ray refuses {', '.join(refused)} of the preset"
        yield fail("Ray", text, "`train --executor ray` leaves them out, `RAY_ADDRESS=local` has a Ray of its own")


def _gpu_precision(spec: RunSpec, found: Sequence[gpus.Gpu]) -> Iterator[Finding]:
    precision = spec.rollout.precision
    if reason := gpus.lacks(precision, found):
        yield fail("rollout.precision", reason, f"--rollout {gpus.PRECISIONS[precision].instead}")
    if spec.rollout.kv_cache != "auto" and (reason := gpus.outside(gpus.CACHE, "an FP8 KV cache", found)):
        yield fail("rollout.kv_cache", reason, "--set rollout.kv_cache=auto")


def enough(resources: ResourceSpec, found: int) -> Iterator[Finding]:
    """Yield whether a machine with `found` GPUs, and no cluster, has what a run on GPUs asks for."""
    wanted = f"{resources.nodes} x {resources.gpus_per_node} CUDA GPUs"
    if resources.nodes > 1 or found < resources.gpus_per_node:
        yield fail(
            "resources",
            f"it needs {wanted}; this machine has {found}",
            "`--executor ray` on a cluster that has them, or extend base/cpu with a small model",
        )
    else:
        yield ok("resources", f"{wanted} of {found}")


def attention(spec: RunSpec, versions: Mapping[str, str]) -> Finding:
    """How a run on GPUs gets its attention: a run that asks for flash-attn dies without it."""
    finding = software.flash_attention(versions, needs.WITHOUT_FLASH)
    if "flash-attn" in versions or "kernels" in versions:
        return finding
    if not needs.needs_flash(spec):
        return ok(finding.name, "not installed, and the preset goes without")
    fix = software.BUILD_FLASH_ATTENTION if needs.cannot_do_without_flash(spec) else finding.fix
    return fail(finding.name, finding.text, fix)


def gpu_memory(spec: RunSpec) -> list[int]:
    """Bytes of each GPU of this machine; empty for a run on a CPU, or on a cluster, whose GPUs cannot be seen from here."""
    if spec.resources.platform == "cpu" or _cluster(spec):
        return []
    return [gpu.memory_mib << 20 for gpu in gpus.seen() if gpu.memory_mib]
