"""What verl 0.9.1's mode separate_async lacks: two corrections of verl, each of which could be made upstream.

The plugin calls `apply` in every process of a run; each function acts where the module that it corrects is used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from typing import Any

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL, before_import

TRAINER = "verl.trainer.ppo.v1.trainer_separate_async"
"""verl's module with the trainer of this mode."""
WORKER = "verl.experimental.separation.engine_workers"
"""verl's module with the worker that keeps the weights of an earlier mini-batch."""


def apply() -> None:
    """Make both corrections in this process, when it needs them. Raises RuntimeError for a verl other than 0.9.1."""
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl corrects the mode separate_async of verl {VERL} only")
    before_import(TRAINER, accept_flush)
    before_import(WORKER, copy_saved_weights)


def accept_flush() -> None:
    """Let the trainer's logger ignore `flush`, an argument of print and not of loggers (idempotent).

    With `hybrid_engine=False` the trainer ends with TypeError in `logger.info(…, flush=True)`
    (verl/trainer/ppo/v1/trainer_separate_async.py:181 in 0.9.1).
    """
    logger = logging.getLogger(TRAINER)
    original = logger.info
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def info(message: object, *args: object, flush: bool = False, **kwargs: Any) -> None:
        original(message, *args, **kwargs)

    setattr(info, PATCHED, True)
    logger.info = info  # type: ignore[method-assign, assignment]


def copy_saved_weights() -> None:
    """Let FSDP2's `fsdp2_sharded_save_to_cpu` return copies where the parameters are on the CPU already (idempotent).

    From the second mini-batch of a batch on, the trainer saves its weights, takes those of the first for π_old, and
    then its own again (verl/trainer/ppo/v1/trainer_separate_async.py:187 in 0.9.1). `.detach().cpu()` copies nothing
    on the CPU (verl/utils/fsdp_utils.py:1180), where all parameters are on a machine without GPUs, and those that are
    offloaded on one with: what was saved then changes with the parameters. π_old becomes π_θ, so that ratios are
    exactly 1; with `param_offload`, which moves the parameters in between, what the mini-batches before taught is lost.
    The function for FSDP1 copies (verl/utils/fsdp_utils.py:1119).
    """
    import verl.utils.fsdp_utils as verls

    original = verls.fsdp2_sharded_save_to_cpu
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def fsdp2_sharded_save_to_cpu(model: Any) -> Any:
        import torch

        if torch.cuda.is_initialized():
            # parameters are offloaded in the background: before that ends, their memory holds anything (:204)
            torch.cuda.synchronize()
        state, spec = original(model)
        shared = {
            name
            for name, param in model.named_parameters()
            if getattr(param, "_local_tensor", param).device.type == "cpu"
        }
        return {
            name: (tensor.clone() if name in shared else tensor, layout) for name, (tensor, layout) in state.items()
        }, spec

    contract.replace_in_verl(verls, fsdp2_sharded_save_to_cpu)
