"""What the unit tests take for verl's mismatch metrics is what verl's own code makes of the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.runs import sampled

pytestmark = pytest.mark.filterwarnings("ignore")


def by_verl(batch: sampled.Batch, cap: float | None) -> dict[str, float]:
    """verl's metrics of a padded batch."""
    import torch
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.utils.debug.metrics import calculate_debug_metrics

    shape = (len(batch), max(map(len, batch)))
    rollout, trainer, mask = torch.full(shape, -3.0), torch.full(shape, -0.5), torch.zeros(shape)
    for row, response in enumerate(batch):
        for column, (one, other) in enumerate(response):
            rollout[row, column], trainer[row, column], mask[row, column] = one, other, 1.0
    _, _, metrics = compute_rollout_correction_and_rejection_mask(
        old_log_prob=trainer,
        rollout_log_prob=rollout,
        response_mask=mask,
        rollout_is=None if cap is None else "token",
        rollout_is_threshold=cap,
    )
    tensors: Any = {"rollout_log_probs": rollout, "old_log_probs": trainer, "response_mask": mask, "responses": mask}
    return {**metrics, **calculate_debug_metrics(DataProto.from_dict(tensors=tensors))}


@pytest.mark.parametrize("cap", [None, 1.5, 8.0])
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_metrics_are_verls(noise: float, cap: float | None) -> None:
    batch = sampled.sample(noise, responses=8, length=20)
    verls, ours = by_verl(batch, cap), sampled.logged(batch, cap)
    compared = {key for key in ours if key.startswith(("rollout_corr/", "training/"))}
    assert compared <= set(verls)
    assert {key: verls[key] for key in compared} == pytest.approx(
        {key: ours[key] for key in compared}, rel=2e-3, abs=2e-6
    )
    assert any("rollout_is" in key for key in verls) is (cap is not None)
