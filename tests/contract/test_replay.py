"""Replayed weights are verl's own, and verl's trainer keeps what they are made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashrl_cli import contract
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.plugins import log_ratios, samples
from flashrl_cli.runs.replay import COMPARED, Correction, Reject, Replayed, weights

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""
LENGTHS = (7, 1, 4, 6, 0)
"""The last response is padding."""
MORE = (
    Correction(kind="tis", cap=2, reject=Reject(by="seq-mean", estimator="k2", upper=0.2)),
    Correction(kind="seq-tis", cap=2, reject=Reject(by="seq-sum", estimator="k3", upper=0.5)),
    Correction(kind="icepop", lower=0.8, cap=1.3, reject=Reject(by="seq-max", estimator="k2", upper=0.3)),
    Correction(reject=Reject(by="token", estimator="k3", upper=0.1)),
)


def batch() -> tuple[Any, Any]:
    """Log-ratios and mask [5, 7]."""
    import torch

    make = torch.Generator().manual_seed(5)
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    return 0.4 * torch.randn(5, 7, generator=make, dtype=torch.float64) * mask, mask


def by_verl(correction: Correction, ratios: Any, mask: Any) -> Any:
    """The factor of each token by verl's own functions."""
    import torch
    from verl.trainer.ppo.rollout_corr_helper import (
        compute_rollout_correction_weights,
        compute_rollout_rejection_mask,
    )

    found = torch.ones_like(ratios)
    if correction.kind != "none":
        level = "sequence" if correction.kind == "seq-tis" else "token"
        threshold = f"{correction.lower}_{correction.cap}" if correction.kind == "icepop" else correction.cap
        found, _ = compute_rollout_correction_weights(ratios, mask, level, threshold)
    if (reject := correction.reject) is None:
        return found
    lower = 1 / reject.upper if reject.lower is None else reject.lower
    bounds = f"{1 / reject.upper}_{1 / lower}" if reject.estimator == "k1" else reject.upper
    name = f"{reject.by.replace('-', '_')}_{reject.estimator}"
    stays, _ = compute_rollout_rejection_mask(ratios, mask, name, bounds)
    return found * stays


@pytest.mark.parametrize("correction", [*COMPARED, *MORE], ids=str)
def test_weights_are_those_of_verl(correction: Correction) -> None:
    ratios, mask = batch()
    kept = Replayed(ratios[mask > 0].numpy(), np.array(LENGTHS[:-1]), np.ones(4))
    assert weights(kept, correction) == pytest.approx(by_verl(correction, ratios, mask)[mask > 0].numpy())


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """verl's trainer module in a process of a run; afterwards it is as it was."""
    import verl.trainer.ppo.rollout_corr_helper as corrections
    import verl.trainer.ppo.v1.trainer_base as module
    import verl.trainer.ppo.v1.utils as advantages
    from verl.utils.skip import SkipManager

    for holder in (corrections, advantages, module):
        for name in ("compute_rollout_correction_and_add_to_batch", "compute_advantage_for_multi_trajectories"):
            if hasattr(holder, name):
                monkeypatch.setattr(holder, name, getattr(holder, name))
    monkeypatch.setenv(contract.ENV_PLUGIN_DIR, str(AttemptPaths(tmp_path).plugins))
    monkeypatch.setenv(contract.ENV_KEEP, "3")
    monkeypatch.setattr(SkipManager, "step", 12)
    log_ratios.apply()
    return module


def correct_and_advance(trainer: Any, rejects: str | None = None) -> Any:
    """What `_compute_advantage` of verl's trainer does with a batch, without its queue (trainer_base.py:1770-1784)."""
    import torch
    from omegaconf import OmegaConf
    from verl.protocol import DataProto

    ratios, mask = batch()
    rollout = -torch.ones_like(ratios) * mask
    scores = torch.zeros_like(ratios)
    scores[torch.arange(4), torch.tensor(LENGTHS[:-1]) - 1] = torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    data = DataProto.from_dict(
        tensors={
            "old_log_probs": rollout + ratios,
            "rollout_log_probs": rollout,
            "response_mask": mask,
            "token_level_rewards": scores,
            "rm_scores": scores,
        },
        non_tensors={"uid": np.array(["a", "a", "b", "b", "c"], dtype=object)},
    )
    config = OmegaConf.create({"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_rs": rejects})
    config.rollout_rs_threshold = "0.8_1.25" if rejects else None
    data, _ = trainer.compute_rollout_correction_and_add_to_batch(data, config)
    keys = [f"{uid}_0_0" for uid in "vwxyz"]
    return trainer.compute_advantage_for_multi_trajectories(data, keys, adv_estimator="grpo", num_repeat=2)


def kept(tmp_path: Path) -> log_ratios.Sample:
    return log_ratios.read(log_ratios.file_of(AttemptPaths(tmp_path).log_ratios, 12))


@pytest.mark.parametrize("rejects", [None, "token_k1"])
def test_a_step_is_kept_as_verl_computes_it(rejects: str | None, trainer: Any, tmp_path: Path) -> None:
    """Rejected tokens, too, whose advantage is the response's."""
    data = correct_and_advance(trainer, rejects)
    ratios, mask = batch()
    found = kept(tmp_path)
    assert (found.step, found.responses, len(found.lengths)) == (12, 4, 3)
    rows = log_ratios.rows_to_keep(12, 3, np.array(LENGTHS))
    assert found.lengths.tolist() == [LENGTHS[row] for row in rows]
    assert found.log_ratios == pytest.approx(np.concatenate([ratios[r][mask[r] > 0].numpy() for r in rows]), abs=1e-3)
    given = [data.batch["advantages"][row][data.batch["response_mask"][row] > 0] for row in rows]
    assert found.advantages == pytest.approx([float(one[0]) if len(one) else np.nan for one in given], nan_ok=True)
    assert {len(one) for one in given} != set(found.lengths) or rejects is None


def test_responses_are_kept_as_text_with_what_verl_computes(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transfer_queue
    from tensordict import NonTensorStack, TensorDict

    asked: list[list[str]] = []

    def kv_batch_get(keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        asked.append(keys)
        rows = [torch.tensor([ord(key[0])] * (number + 1)) for number, key in enumerate(keys)]
        tokens = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        truths = NonTensorStack(*({"ground_truth": key[0]} for key in keys))
        return TensorDict({"prompts": tokens, "responses": tokens, "reward_model": truths}, batch_size=len(keys))

    monkeypatch.setattr(transfer_queue, "kv_batch_get", kv_batch_get)
    monkeypatch.setenv(contract.ENV_SAMPLES, "4")
    tokenizer = SimpleNamespace(decode=lambda row, **_: "".join(map(chr, row.tolist())))
    data = SimpleNamespace(max_response_length=max(LENGTHS))
    config = SimpleNamespace(data=data)
    samples.remember(SimpleNamespace(tokenizer=tokenizer, config=config, parameter_sync_step=1, local_trigger_step=0))
    done = correct_and_advance(trainer)
    monkeypatch.setattr(samples, "_TRAINER", [])
    found = samples.read(samples.file_of(AttemptPaths(tmp_path).samples, 12))
    ratios, mask = batch()
    names = [f"{uid}_0_0" for uid in "vwxyz"]
    assert sorted(asked[0]) == names[:4], "the last row is padding"
    for number, one in enumerate(found):
        row = names.index(asked[0][number])
        assert one.prompt == one.response == asked[0][number][0] * (number + 1)
        assert one.ground_truth == asked[0][number][0]
        assert (one.length, one.truncated) == (LENGTHS[row], LENGTHS[row] == max(LENGTHS))
        assert one.reward == float(done.batch["rm_scores"][row].sum())
        weights = ratios[row][mask[row] > 0].float().exp()
        assert one.weight == pytest.approx(float(weights.mean()))
        assert one.weight_max == pytest.approx(float(weights.max()))
        assert one.advantage == pytest.approx(float(done.batch["advantages"][row][0]))


def test_rows_that_cannot_be_fetched_end_no_run(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(contract.ENV_SAMPLES, "4")
    monkeypatch.setattr(samples, "_TRAINER", [SimpleNamespace(tokenizer=None, local_trigger_step=0)])
    contract.logger().addHandler(caplog.handler)
    try:
        correct_and_advance(trainer)  # without a TransferQueue
    finally:
        contract.logger().removeHandler(caplog.handler)
    assert "the responses of step 12 are not kept" in caplog.text
    assert samples.steps_in(AttemptPaths(tmp_path).samples) == {}


def test_the_trainer_itself_is_changed_once(trainer: Any) -> None:
    first = trainer.compute_rollout_correction_and_add_to_batch
    assert getattr(first, contract.PATCHED)
    assert getattr(trainer.compute_advantage_for_multi_trajectories, contract.PATCHED)
    log_ratios.keep()
    assert trainer.compute_rollout_correction_and_add_to_batch is first


def test_without_rollout_log_probs_nothing_is_kept(trainer: Any, tmp_path: Path) -> None:
    """verl then skips the correction, and comes to the advantages alone."""
    data = correct_and_advance(trainer)
    for path in AttemptPaths(tmp_path).log_ratios.iterdir():
        path.unlink()
    trainer.compute_advantage_for_multi_trajectories(data, [f"{uid}_0_0" for uid in "vwxyz"], adv_estimator="grpo")
    assert not log_ratios.steps_in(AttemptPaths(tmp_path).log_ratios)


def test_a_full_disk_ends_no_run(trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AttemptPaths(tmp_path).log_ratios.write_text("a file where the folder should be")
    contract.logger().addHandler(caplog.handler)
    try:
        correct_and_advance(trainer)
    finally:
        contract.logger().removeHandler(caplog.handler)
    assert "step 12 are not kept" in caplog.text


def test_another_verl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.9.2")
    with pytest.raises(RuntimeError, match=r"verl 0\.9\.1 only"):
        log_ratios.keep()


def test_printed_where_the_launcher_cannot_read(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(contract.ENV_PRINT, "1")
    correct_and_advance(trainer)
    elsewhere = log_ratios.Printed(tmp_path / "elsewhere")
    assert [line for line in capsys.readouterr().out.splitlines() if elsewhere.take(line)]
    right, found = kept(tmp_path), log_ratios.read(log_ratios.file_of(tmp_path / "elsewhere", 12))
    assert np.array_equal(right.log_ratios, found.log_ratios)
