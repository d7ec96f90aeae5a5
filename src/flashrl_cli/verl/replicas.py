"""How many engines a run's rollout has, and how many of them stay in bf16."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec

DATA_PARALLEL = "actor_rollout_ref.rollout.data_parallel_size"
ROUNDING = 1e-9
"""0.07 x 100 is a little more than 7 in binary."""


def engine_devices(spec: RunSpec) -> int:
    """Devices an engine takes (verl/workers/rollout/replica.py:107; verl has no pipeline parallelism for vLLM)."""
    width = spec.verl.get(DATA_PARALLEL, spec.verl.get(f"+{DATA_PARALLEL}"))
    return spec.rollout.tensor_parallel * (width if isinstance(width, int) and width > 0 else 1)


def replicas(spec: RunSpec) -> int:
    """Engines of a run whose rollout shares the trainer's devices (verl/workers/rollout/llm_server.py:460)."""
    return spec.resources.nodes * spec.resources.gpus_per_node // engine_devices(spec)


def bf16_replicas(spec: RunSpec) -> int:
    """Replicas that `rollout.mix` leaves in bf16, the first ones: its share of all, rounded up."""
    return math.ceil(spec.rollout.mix * replicas(spec) - ROUNDING)
