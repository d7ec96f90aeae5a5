"""Which of a run's replicas this process serves, and whether it is one of those that stay in bf16 (`rollout.mix`).

verl gives all replicas the same engine arguments (verl/workers/rollout/vllm_rollout/vllm_async_server.py:1310). What differs is a variable
that each server actor sets before it starts its engine, for the sockets that weights come through; all processes of the engine inherit it.
"""

from __future__ import annotations

import os

from flashrl_cli import contract

RANK = "VERL_REPLICA_RANK"
"""The replica's number, from 0 (vllm_async_server.py:136; read by verl's own workers in vllm_rollout/utils.py:424)."""


def stays_in_bf16() -> bool:
    """Whether this process's engine keeps its linear layers in bf16; raises RuntimeError where a mixed run's replica has no number."""
    count = contract.RolloutOptions.here().bf16_replicas
    if count == 0:
        return False
    rank = os.environ.get(RANK)
    if rank is None:
        raise RuntimeError(f"{count} replicas are to stay in bf16, and {RANK} does not say which this is")
    return int(rank) < count
