"""A sample of each step's log-ratios between trainer and rollout, which verl computes, uses and forgets.

verl's trainer turns log p_train - log p_rollout of every token into importance weights, logs a few of their moments and
drops them (verl/trainer/ppo/v1/trainer_base.py:1743-1800 in 0.9.1); its dump of rollouts (`trainer.rollout_data_dir`,
:1297) has texts and scores only. What other caps or kinds of correction would have done cannot be computed from
moments, but from the ratios (`runs.replay`): a few hundred responses a step are enough, and small as float16.

A step is one file in `log_ratios/` of the attempt's folder. If the launcher cannot read that folder, a smaller sample
is printed as well, and the launcher writes the file (`Printed`).
"""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import io
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli import contract, files
from flashrl_cli.contract import PATCHED, VERL, before_import
from flashrl_cli.errors import InputError
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.plugins import samples, staleness

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

SCHEMA_VERSION = 1
STEP_TOKENS = 1 << 20
"""Expected tokens of a step's file at most: 2 MiB."""
ATTEMPT_BYTES = 256 << 20
"""Size of an attempt's files at most; beyond it the oldest steps are removed."""
PRINTED_TOKENS = 1 << 15
"""The same as STEP_TOKENS where a step goes through the log: 90 KB of text."""
MARK = "FLASHRL_LOG_RATIOS "
"""Start of a printed part within its line: step, number of the part, number of parts, and the part in base64."""
PART = 8192
"""Characters of a printed part."""
LARGEST = 100.0
"""Log-ratios are kept up to this size; verl's weights clamp them at 20 (rollout_corr_helper.py:75)."""
_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_NAME = re.compile(r"step_(\d+)\.npz")
_WRITTEN: list[Sample] = []
"""The sample that this process's trainer wrote last, to which the next batch of the same step is added."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sample:
    """Log-ratios log p_train - log p_rollout of some responses of a step, in nats.

    `log_ratios` is float16 [tokens], response after response in random order, of the tokens that are trained on before
    any is rejected. `lengths` is int32 [responses]. `advantages` is float32 [responses]: the mean over a response's
    tokens, NaN if all of them were rejected. `responses` is the number of responses that the step trained on.
    `staleness` is int16 [tokens] (plugins/staleness.py), None from a synchronous trainer, where it is 0.
    """

    step: int
    responses: int
    log_ratios: NDArray[np.float16]
    lengths: NDArray[np.int32]
    advantages: NDArray[np.float32]
    staleness: NDArray[np.int16] | None = None

    def most_stale(self) -> NDArray[np.int16]:
        """The staleness of each response's most stale token [responses]; 0 from a synchronous trainer."""
        import numpy as np

        if self.staleness is None:
            return np.zeros(len(self.lengths), np.int16)
        found: NDArray[np.int16] = np.maximum.reduceat(self.staleness, np.cumsum(self.lengths) - self.lengths)
        return found

    def chosen(self, rows: NDArray[np.bool_]) -> Sample:
        """A sample of some of the responses [responses]."""
        import numpy as np

        tokens: NDArray[np.bool_] = np.repeat(rows, self.lengths)
        return Sample(
            step=self.step,
            responses=self.responses,
            log_ratios=self.log_ratios[tokens],
            lengths=self.lengths[rows],
            advantages=self.advantages[rows],
            staleness=None if self.staleness is None else self.staleness[tokens],
        )

    def joined(self, other: Sample) -> Sample:
        """The responses of this sample and of another one of the same step, which both have a staleness or none."""
        import numpy as np

        stale = [one for one in (self.staleness, other.staleness) if one is not None]
        return Sample(
            step=self.step,
            responses=self.responses + other.responses,
            log_ratios=np.concatenate([self.log_ratios, other.log_ratios]),
            lengths=np.concatenate([self.lengths, other.lengths]),
            advantages=np.concatenate([self.advantages, other.advantages]),
            staleness=np.concatenate(stale) if len(stale) == 2 else None,
        )


def file_of(folder: Path, step: int) -> Path:
    """The file of a step."""
    return folder / f"step_{step:06d}.npz"


def steps_in(folder: Path) -> dict[int, Path]:
    """The files in a folder by step, in order; empty if there is no folder."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step_*.npz")]
    return dict(sorted((int(name[1]), path) for name, path in found if name))


def write(folder: Path, sample: Sample) -> None:
    """Write a step's file, and remove those of the oldest steps if the folder becomes too large."""
    _write(folder, sample.step, _packed(sample))


def _packed(sample: Sample) -> bytes:
    """The contents of a sample's file, in the format of numpy's npz."""
    import numpy as np

    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        schema_version=SCHEMA_VERSION,
        step=sample.step,
        responses=sample.responses,
        log_ratios=sample.log_ratios,
        lengths=sample.lengths,
        advantages=sample.advantages,
        **({} if sample.staleness is None else {"staleness": sample.staleness}),
    )
    return stream.getvalue()


def _write(folder: Path, step: int, data: bytes) -> None:
    with files.replacing(file_of(folder, step)) as temporary:
        temporary.write_bytes(data)
    files.keep_newest(list(steps_in(folder).values()), ATTEMPT_BYTES)


def read(path: Path) -> Sample:
    """Read a step's file. Raises InputError if it is damaged or of another version, FileNotFoundError if it is gone."""
    import zipfile
    import zlib

    import numpy as np

    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            if int(found["schema_version"]) != SCHEMA_VERSION:
                raise InputError(
                    f"{path} has version {int(found['schema_version'])} of its format, and this flashrl reads "
                    f"{SCHEMA_VERSION}",
                    hint="read it with the flashrl that wrote it",
                )
            sample = Sample(
                step=int(found["step"]),
                responses=int(found["responses"]),
                log_ratios=found["log_ratios"],
                lengths=found["lengths"],
                advantages=found["advantages"],
                staleness=found.get("staleness"),
            )
        _check(sample)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        hint = "remove the file: the other steps are read without it"
        raise InputError(f"{path} is damaged: {error}", hint=hint) from None
    return sample


def _check(sample: Sample) -> None:
    """Raise ValueError if the arrays do not fit each other."""
    import numpy as np

    lengths = sample.lengths
    if sample.log_ratios.ndim != 1 or lengths.ndim != 1 or not len(lengths) or lengths.min() < 1:
        raise ValueError("it holds no responses")
    if lengths.sum() != len(sample.log_ratios) or sample.advantages.shape != lengths.shape:
        raise ValueError("its lengths do not fit its tokens")
    if sample.staleness is not None and sample.staleness.shape != sample.log_ratios.shape:
        raise ValueError("its staleness does not fit its tokens")
    if not np.isfinite(sample.log_ratios).all():
        raise ValueError("a log-ratio is not finite")


def rows_to_keep(
    step: int, keep: int, lengths: NDArray[np.integer[Any]], most: float = STEP_TOKENS
) -> NDArray[np.intp]:
    """Rows of `keep` of the responses that have these `lengths` in tokens, in random order.

    They are fewer if they would have more than `most` tokens.

    The number depends on the mean length only, so that long responses are as likely as short ones. Rows without tokens
    (padding) are left out. The same step draws the same rows.
    """
    import numpy as np

    rows = np.flatnonzero(lengths)
    if not len(rows):
        return rows
    count = max(1, min(keep, len(rows), int(most / lengths[rows].mean())))
    return np.random.default_rng(step).choice(rows, count, replace=False)


def printed(sample: Sample) -> Iterator[str]:
    """Yield the lines in which a step's file is printed, with as many responses as a log should bear, at random."""
    import numpy as np

    count = max(1, int(len(sample.lengths) * min(1.0, PRINTED_TOKENS / len(sample.log_ratios))))
    order = np.random.default_rng(sample.step).permutation(len(sample.lengths))
    text = base64.b64encode(_packed(sample.chosen(order < count))).decode()
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    for number, part in enumerate(parts, 1):
        yield f"{MARK}{sample.step} {number} {len(parts)} {part}"


class Printed:
    """Collects the printed parts of steps, in order or not, and writes a step's file once all are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step = 0
        self._parts: dict[int, str] = {}

    def take(self, line: str) -> bool:
        """Take a line of a log; whether it is a part of a step."""
        _, mark, text = line.partition(MARK)
        if not mark:
            return False
        with contextlib.suppress(ValueError):  # a line that was cut, or another program's
            step, number, count, part = text.split()
            self._add(int(step), int(number), int(count), part)
        return True

    def _add(self, step: int, number: int, count: int, part: str) -> None:
        if step != self._step:
            self._step, self._parts = step, {}
        self._parts[number] = part
        if len(self._parts) == count:
            data = base64.b64decode("".join(text for _, text in sorted(self._parts.items())), validate=True)
            self._parts = {}
            _write(self._folder, step, data)


def apply() -> None:
    """Keep samples in the process that imports verl's trainer, if the run asks for it."""
    if os.environ.get(contract.ENV_KEEP) or os.environ.get(contract.ENV_SAMPLES):
        before_import(_TRAINER, keep)


def keep() -> None:
    """Have verl's trainer keep a sample of the log-ratios of each step, and some responses as text (idempotent).

    The ratios and the mask before rejection are those that verl's correction gets
    (verl/trainer/ppo/v1/trainer_base.py:1771 in 0.9.1; no upstream issue asks for them), the advantages those that
    follow (:1775). Without log-probs of the rollout, and in bypass mode, verl corrects nothing and nothing is kept.
    Raises RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl keeps log-ratios with verl {VERL} only")
    import verl.trainer.ppo.rollout_corr_helper as corrections
    import verl.trainer.ppo.v1.utils as advantages
    from verl.utils.skip import SkipManager

    correct, advance = (
        corrections.compute_rollout_correction_and_add_to_batch,
        advantages.compute_advantage_for_multi_trajectories,
    )
    if getattr(correct, PATCHED, False):
        return
    before: dict[str, Any] = {}

    def compute_rollout_correction_and_add_to_batch(batch: Any, rollout_corr_config: Any) -> Any:
        before["mask"] = batch.batch["response_mask"]
        return correct(batch, rollout_corr_config)

    def compute_advantage_for_multi_trajectories(data: Any, batch_keys: Any, *args: Any, **more: Any) -> Any:
        found = advance(data, batch_keys, *args, **more)
        corrected, mask = "mask" in before, before.pop("mask", found.batch["response_mask"])
        if corrected and os.environ.get(contract.ENV_KEEP):
            _keep(SkipManager.step, found.batch, mask)
        samples.keep(SkipManager.step, found.batch, mask, batch_keys)
        return found

    contract.replace_in_verl(corrections, compute_rollout_correction_and_add_to_batch)
    contract.replace_in_verl(advantages, compute_advantage_for_multi_trajectories)


def _keep(step: int, batch: Mapping[str, Any], mask: Any) -> None:
    """Write a sample of a batch, whose tensors and `mask` are [responses, longest]; a full disk ends no run.

    The batches of a step that samples several are kept in one file.
    """
    folder, parts = contract.plugin_dir(), staleness.mini_batches()
    share = math.ceil(int(os.environ[contract.ENV_KEEP]) / parts)
    rows = rows_to_keep(step, share, mask.sum(-1).cpu().numpy(), STEP_TOKENS / parts)
    if folder is None or not len(rows):
        return
    stale = staleness.of_rows(mask)
    tokens, left = mask[rows].bool(), batch["response_mask"][rows].float()
    ratios = (batch["old_log_probs"][rows] - batch["rollout_log_probs"][rows])[tokens]
    sample = Sample(
        step=step,
        responses=int((mask.sum(-1) > 0).sum()),
        log_ratios=_numpy(ratios.clamp(-LARGEST, LARGEST).half()),
        lengths=_numpy(tokens.sum(-1).int()),
        advantages=_numpy((batch["advantages"][rows].float() * left).sum(-1) / left.sum(-1)),
        staleness=None if stale is None else _numpy(stale[rows][tokens.cpu()]),
    )
    if parts > 1 and _WRITTEN and _WRITTEN[0].step == step:
        sample = _WRITTEN[0].joined(sample)
    _WRITTEN[:] = [sample]
    place = AttemptPaths(folder.parent).log_ratios
    try:
        write(place, sample)
    except OSError as error:
        contract.logger().warning("the log-ratios of step %d are not kept: %s", step, error)
    if os.environ.get(contract.ENV_PRINT) and staleness.last_mini_batch():
        for line in printed(sample):
            print(line, flush=True)


def _numpy(tensor: Any) -> Any:
    return tensor.cpu().numpy()
