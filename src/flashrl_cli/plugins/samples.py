"""A few responses of each step as text, with reward, length and importance weights.

verl's own dump (`trainer.rollout_data_dir`, verl/trainer/ppo/v1/trainer_base.py:1297 in 0.9.1) decodes and writes all
responses of every step, 16,000 tokens long or not, and has neither advantages nor weights. Here some are chosen where
the trainer has just computed the advantages (`plugins.log_ratios`), and only their tokens are fetched from
TransferQueue: the least rewarded, the longest, and others at random. A step is one file in `samples/` of the attempt's
folder. Workers whose launcher cannot read that folder keep none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, files
from flashrl_cli.errors import InputError
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.reward_function import plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA_VERSION = 1
ATTEMPT_BYTES = 64 << 20
"""Size of an attempt's files at most; beyond it the oldest steps are removed."""
LONGEST_TEXT = 20_000
"""Characters of a prompt or a response that are kept, from its start and its end."""
PICKED = ("worst", "longest", "random")
_NAME = re.compile(r"step_(\d+)\.json")
_TRAINER: list[Any] = []
"""This process's trainer of verl's, once there is one."""
_CANDIDATES: list[Sample] = []
"""What was chosen of the mini-batches before in this step, of those modes that sample one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response of a step.

    `length` is in tokens; `truncated` says that it has as many as a response may have. `advantage` is the mean over its
    tokens, None if all were rejected. `weight` and `weight_max` are the mean and the largest importance weight
    p_train / p_rollout of its tokens before a cap, None without log-probs of the rollout. `picked` says why it was
    kept: it has one of the smallest rewards of the step, or is one of the longest, or was drawn at random.
    """

    step: int
    prompt: str
    response: str
    ground_truth: Any
    reward: float
    length: int
    truncated: bool
    advantage: float | None
    weight: float | None
    weight_max: float | None
    picked: str


def remember(trainer: Any) -> None:
    """Take a trainer of verl's, of which `keep` needs the tokenizer and the configuration."""
    _TRAINER[:] = [trainer]


def file_of(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step_{step:06d}.json"


def steps_in(folder: Path) -> dict[int, Path]:
    """The files in a folder by step, in order; empty if there is no folder."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step_*.json")]
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def read(path: Path) -> list[Sample]:
    """Read a step's file. Raises InputError if it is damaged or of another version, FileNotFoundError if it is gone."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] == SCHEMA_VERSION:
            return [Sample(**one) for one in document["samples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", hint="remove the file: the other steps are read") from None
    raise InputError(f"{path} has version {document['schema_version']} of its format, not {SCHEMA_VERSION}")


def rows_to_keep(
    step: int, keep: int, rewards: NDArray[np.floating[Any]], lengths: NDArray[np.integer[Any]]
) -> dict[int, str]:
    """Rows of `keep` responses, and why each is kept: a quarter by least reward, a quarter by length.

    The others are drawn at random. Rows without tokens (padding) are left out. The same step draws the same rows.
    """
    import numpy as np

    rows = np.random.default_rng(step).permutation(np.flatnonzero(lengths))
    worst = rows[np.argsort(rewards[rows], kind="stable")][: keep // 4]
    longest = rows[np.argsort(-lengths[rows], kind="stable")]
    found = dict.fromkeys(map(int, worst), PICKED[0])
    found |= dict.fromkeys([row for row in map(int, longest) if row not in found][: keep // 4], PICKED[1])
    left = keep - len(found)
    return found | dict.fromkeys([row for row in map(int, rows) if row not in found][:left], PICKED[2])


def of_mini_batches(step: int, keep: int, candidates: Sequence[Sample]) -> list[Sample]:
    """`keep` samples of those that were chosen of a step's mini-batches: the worst, the longest, and random ones."""
    import numpy as np

    if len(candidates) <= keep:
        return list(candidates)
    worst = sorted(candidates, key=lambda one: one.reward)[: keep // 4]
    longest = sorted((one for one in candidates if one not in worst), key=lambda one: -one.length)[: keep // 4]
    found = [replace(one, picked=why) for why, some in zip(PICKED, (worst, longest), strict=False) for one in some]
    drawn = [one for one in candidates if one.picked == PICKED[2] and one not in worst and one not in longest]
    order = np.random.default_rng(step).permutation(len(drawn))
    return [*found, *(drawn[place] for place in order[: keep - len(found)])]


def keep(step: int, batch: Mapping[str, Any], mask: Any, keys: Sequence[str]) -> None:
    """Write some responses of a batch of tensors [responses, longest]; `mask` is that before any token is rejected.

    `keys` are the responses' in TransferQueue. Where a step samples several batches, its file is written at the last.
    Neither a full disk nor a row that cannot be fetched ends a run.
    """
    folder, count = contract.plugin_dir(), int(os.environ.get(contract.ENV_SAMPLES) or 0)
    if folder is None or not count or not _TRAINER or os.environ.get(contract.ENV_PRINT):
        return
    trainer = _TRAINER[0]
    if trainer.local_trigger_step == 0:
        _CANDIDATES.clear()
    rewards, lengths = (tensor.sum(-1).cpu().numpy() for tensor in (batch["rm_scores"], mask))
    chosen = rows_to_keep(step, count, rewards, lengths)
    if not chosen:
        return
    try:
        texts = _texts([keys[row] for row in chosen], trainer.tokenizer)
    except Exception as error:  # noqa: BLE001  (of TransferQueue and the tokenizer, on which no run should depend here)
        contract.logger().warning("the responses of step %d are not kept: %s: %s", step, type(error).__name__, error)
        return
    longest = trainer.config.data.max_response_length
    found = [
        Sample(
            step=step,
            **texts[place],
            reward=float(rewards[row]),
            length=int(lengths[row]),
            truncated=int(lengths[row]) >= longest,
            picked=why,
            **_of_tokens(batch, mask, row),
        )
        for place, (row, why) in enumerate(chosen.items())
    ]
    _CANDIDATES.extend(found)
    if trainer.local_trigger_step < trainer.parameter_sync_step - 1:
        return
    try:
        write(AttemptPaths(folder.parent).samples, step, of_mini_batches(step, count, _CANDIDATES))
    except OSError as error:
        contract.logger().warning("the responses of step %d are not kept: %s", step, error)


def write(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """Write a step's file, and remove those of the oldest steps if the folder becomes too large."""
    document = {"schema_version": SCHEMA_VERSION, "step": step, "samples": [asdict(one) for one in samples]}
    files.write_text(file_of(folder, step), json.dumps(document, ensure_ascii=False, default=plain))
    files.keep_newest(list(steps_in(folder).values()), ATTEMPT_BYTES)


def _texts(keys: Sequence[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Prompt, response and ground truth of rows of TransferQueue."""
    import transfer_queue as tq

    fields = ["prompts", "responses", "reward_model"]
    data = tq.kv_batch_get(keys=list(keys), partition_id="train", select_fields=fields)
    truths = [one.get("ground_truth") if isinstance(one, dict) else None for one in data.pop("reward_model").tolist()]
    prompts, responses = (
        [_shortened(tokenizer.decode(row, skip_special_tokens=True)) for row in data[name].unbind()]
        for name in fields[:2]
    )
    return [
        {"prompt": prompt, "response": response, "ground_truth": truth}
        for prompt, response, truth in zip(prompts, responses, truths, strict=True)
    ]


def _shortened(text: str) -> str:
    half, left = LONGEST_TEXT // 2, len(text) - LONGEST_TEXT
    return text if left <= 0 else f"{text[:half]}\n[… {left:,} characters …]\n{text[-half:]}"


def _of_tokens(batch: Mapping[str, Any], mask: Any, row: int) -> dict[str, Any]:
    """Advantage and importance weights of a response."""
    tokens, left = mask[row].bool(), batch["response_mask"][row].bool()
    advantage = float(batch["advantages"][row][left].float().mean()) if bool(left.any()) else None
    if "rollout_log_probs" not in batch or "old_log_probs" not in batch:
        return {"advantage": advantage, "weight": None, "weight_max": None}
    weights = (batch["old_log_probs"][row] - batch["rollout_log_probs"][row])[tokens].float().clamp(-20, 20).exp()
    return {"advantage": advantage, "weight": float(weights.mean()), "weight_max": float(weights.max())}
