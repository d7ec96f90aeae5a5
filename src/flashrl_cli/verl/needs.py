"""What verl will need of a machine for a run: flash-attn or not, and disk for its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashrl_cli.config.spec import RunSpec, VerlValue

ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
UNPADDED = "actor_rollout_ref.model.use_remove_padding"
SEQUENCE_PARALLEL = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
SAVED = "actor_rollout_ref.actor.checkpoint.save_contents"
LORA = "actor_rollout_ref.model.lora_rank"
KEPT = "trainer.max_actor_ckpt_to_keep"
FLASH = "flash_attention_2"
"""verl's default (verl/workers/config/model.py:185)."""
WITHOUT_FLASH = f"--set verl.+{ATTENTION}=sdpa --set verl.{UNPADDED}=false"
"""Options of a run that needs no flash-attn; slower, and not for a critic or for sequence parallelism."""
KEEP_ONE = f"--set verl.{KEPT}=1"
BYTES = {"model": 4, "optimizer": 8, "hf_model": 2}
"""Bytes a parameter of what a checkpoint may hold: weights in float32, Adam's two moments in float32, an export in bfloat16.
Measured on a checkpoint of `tiny`: 1,464,996 and 2,928,624 bytes for 0.366 M parameters."""


def needs_flash(spec: RunSpec) -> bool:
    """Whether a run on GPUs dies without flash-attn, as it is configured."""
    return cannot_do_without_flash(spec) or str(_given(spec, ATTENTION, FLASH)) == FLASH


def cannot_do_without_flash(spec: RunSpec) -> bool:
    """Whether no option helps: verl loads a critic with flash-attn always (verl/utils/model.py:649), Ulysses cuts unpadded sequences."""
    parallel = _given(spec, SEQUENCE_PARALLEL, 1)
    return spec.algorithm.advantage == "gae" or (isinstance(parallel, int) and parallel > 1)


def checkpoint_bytes(spec: RunSpec, parameters: int) -> int:
    """Bytes of one checkpoint of a policy with so many parameters, a critic counted as large as the policy.

    With LoRA the optimizer holds the adapters alone, whose size does not count.
    """
    contents = _given(spec, SAVED, ["model", "optimizer"])
    held = {str(name) for name in (contents if isinstance(contents, list) else [contents])}
    if _given(spec, LORA, 0):
        held.discard("optimizer")
    models = 2 if spec.algorithm.advantage == "gae" else 1
    return models * parameters * sum(size for name, size in BYTES.items() if name in held)


def checkpoints_kept(spec: RunSpec) -> int | None:
    """Checkpoints that lie on the disk in the end: 0 for none; None where verl keeps all and their number is not known."""
    trainer = spec.trainer
    if trainer.save_every <= 0:
        return 0
    limit = _given(spec, KEPT, None)
    saved = -(-trainer.steps // trainer.save_every) if trainer.steps else None
    if isinstance(limit, int) and limit > 0:
        return limit if saved is None else min(limit, saved)
    return saved


def _given(spec: RunSpec, key: str, default: VerlValue) -> VerlValue:
    """Value that a preset gives to a verl key word for word."""
    return spec.verl.get(key, spec.verl.get(f"+{key}", default))
