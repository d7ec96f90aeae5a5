"""Staleness: how many versions the weights that sampled a token are behind those that its importance weight is of.

In the asynchronous modes the rollout engines sample while the trainer trains. verl numbers versions by steps: version v
is the weights after step v, which the engines get at its end (verl/trainer/ppo/v1/trainer_separate_async.py:382 and
trainer_colocate_async.py:40 in 0.9.1). In step t the old log-probs, and with them the importance weights
p_old / p_rollout, are those of version t - 1, for each of the mini-batches that the step samples: the trainer goes back
to it for them (trainer_separate_async.py:207). So

    staleness of a token in step t = t - 1 - version of the engine that sampled it

as verl counts that of responses (trainer_base.py:1979). In mode `sync` it is 0.

verl keeps the first and the last version of a response (verl/workers/rollout/llm_server.py:324), which differ where a
weight update interrupted it. No request lives through an update: the engine aborts all before it takes new weights
(verl/checkpoint_engine/base.py:523; trainer_colocate_async.py:46), and what was sampled of a response until then goes
to the engine again as a prompt. So all tokens of a request are of one version, and the client that puts them together
knows that of each token: `note_versions` makes it say so. Tokens of an agent loop that does not use this client are
counted with the first version of their response.

The figures of each staleness are exact over the tokens of a step, in whatever mini-batches they were trained:

    tokens, share     their number, and their share of the step's tokens
    kl, kl_k3         means of -ln r and of r - ln r - 1, r = p_old / p_rollout, as `rollout_corr/kl` and `k3_kl`
    weight_mean       mean of the importance weights that were applied, and
    effective         their effective sample size (mean w)² / mean w², as a share of the tokens
    truncated         share of tokens whose weight, or the weight of whose response, was above the cap
    prob_diff         mean of |p_old - p_rollout|
    prob_correlation  Pearson's correlation of p_old and p_rollout

Where a step has no tokens of staleness 0, nothing of this says how far the engine is from the weights that it was sent:
separate_async has none once its responses are complete before they are needed. Its trainer keeps the weights of the
previous step until it saves those of the next (trainer_separate_async.py:202), and before that `Watched` scores
`ROWS` responses of the engine with that version again. Their figures have the name `fresh` in place of a staleness.
"""

from __future__ import annotations

import importlib.metadata
import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Counts: TypeAlias = NDArray[np.int64]

VERSIONS = "versions"
"""Extra field of a response, and tag of its row in TransferQueue: pairs of a version and the tokens sampled by it."""
FIRST = "min_global_steps"
"""verl's tag with the first version of a response."""
ROWS = 32
"""Responses that are scored again at once, about: a multiple of what the trainer's processes take."""
EVERY = 10
"""Steps from one such scoring to the next; it moves all weights of the trainer between CPU and GPU three times."""
FAR = 0.05
"""KL of a step's least stale tokens in nats a token from which the next step scores again, too: that of quantization
alone stays below it (`train.supervise`).
"""
_KEPT, _NOW = 0, "flashrl"
"""Names of weights on the CPU: those that verl keeps of a step's start, and those of the moment."""


class Pieces(list[list[int]]):
    """Versions and numbers of tokens of a response, in order; of a class of its own for a weak reference."""


def note_versions(client: Any) -> Any:
    """Let a client of verl's that resumes interrupted responses note the version of each of their pieces.

    Turns of a conversation have one request id and follow each other; the pieces of all of them are in the extra fields
    of the first, of which an agent loop keeps the objects (verl/experimental/agent_loop/tool_agent_loop.py:262 in
    0.9.1). Under `full_determinism` responses share ids, and nothing is noted. Clients of other classes are returned
    unchanged. Raises RuntimeError for a verl other than 0.9.1.
    """
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

    if type(client) is not FullyAsyncLLMServerClient:
        return client
    if client.config.actor_rollout_ref.rollout.get("full_determinism", False):
        return client
    _require_verl()
    now: ContextVar[list[list[int]]] = ContextVar("pieces")

    class RequestClient(LLMServerClient):
        """Makes one request, whose tokens are all of one version."""

        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            output = await super().generate(*args, **kwargs)
            version = output.extra_fields.get("global_steps")
            if output.token_ids and version is not None:
                now.get().append([int(version), len(output.token_ids)])
            return output

    class VersionClient(FullyAsyncLLMServerClient, RequestClient):
        """Makes a request for each piece of a response: `super().generate` there is that of RequestClient."""

        _turns: WeakValueDictionary[str, Pieces]

        async def generate(self, request_id: str, **kwargs: Any) -> Any:
            token = now.set([])
            try:
                output = await super().generate(request_id, **kwargs)
                pieces = self._turns.setdefault(request_id, Pieces())
                pieces += now.get()
            finally:
                now.reset(token)
            output.extra_fields[VERSIONS] = pieces
            return output

    client.__class__ = VersionClient
    client._turns = WeakValueDictionary()
    return client


def tag_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the tag of a response's row says of its versions beside verl's own; the row no longer has it."""
    pieces = row.get("extra_fields", {}).pop(VERSIONS, None)
    return {VERSIONS: [list(piece) for piece in pieces]} if pieces else {}


def versions(tag: Mapping[str, Any], tokens: int) -> Counts | None:
    """The version that sampled each of the `tokens` of a response, by its row's tag; None if it is not known.

    Tokens beyond the noted pieces are of the last of them: agent loops may add an end of the turn.
    """
    import numpy as np

    pieces = tag.get(VERSIONS)
    if not pieces:
        first = tag.get(FIRST)
        return None if first is None else np.full(tokens, first, np.int64)
    numbers, lengths = np.array(pieces, np.int64).T
    found: Counts = np.repeat(numbers, lengths)[:tokens]
    return np.append(found, np.full(tokens - len(found), numbers[-1]))


class Tally:
    """Sums over tokens for each staleness, from which the figures of a step are computed."""

    def __init__(self) -> None:
        self._sums: dict[int, Floats] = {}
        self.weighted = False

    def add(
        self,
        staleness: Counts,
        trainer: Floats,
        rollout: Floats,
        weights: Floats | None = None,
        above: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add tokens: their staleness, log-probs in nats by trainer and rollout, weights, and what was above the cap.

        All arrays are [tokens].
        """
        import numpy as np

        if not len(staleness):
            return
        log_ratios, p, q = trainer - rollout, np.exp(trainer), np.exp(rollout)
        with np.errstate(over="ignore"):
            k3 = np.exp(log_ratios) - log_ratios - 1
        values = [-log_ratios, k3, np.abs(p - q), p, q, p * p, q * q, p * q]
        self.weighted = weights is not None
        if weights is not None and above is not None:
            values += [weights, weights**2, above]
        least = int(staleness.min())
        bins = staleness - least
        sums = np.array([np.bincount(bins), *(np.bincount(bins, value) for value in values)], np.float64)
        for place in np.flatnonzero(sums[0]):
            known = self._sums.get(least + int(place))
            self._sums[least + int(place)] = sums[:, place] if known is None else known + sums[:, place]

    def least_kl(self) -> float:
        """Size of the KL of the least stale tokens, in nats a token; 0 without tokens."""
        if not self._sums:
            return 0.0
        tokens, kl = self._sums[min(self._sums)][:2].tolist()
        return abs(float(kl / tokens))

    def figures(self, name: str | None = None) -> dict[str, float]:
        """The figures under the names of verl's log, or those of all tokens with `name` in place of a staleness.

        What has no value is left out: a correlation where one of the probabilities has no spread, and with `name` the
        share, because these tokens are no part of the step.
        """
        total = sum(float(sums[0]) for sums in self._sums.values())
        return {
            f"{contract.STALENESS}{number if name is None else name}/{figure}": value
            for number, sums in sorted(self._sums.items())
            for figure, value in _figures(sums.tolist(), total, weighted=self.weighted)
            if name is None or figure != "share"
        }


def _figures(sums: list[float], total: float, *, weighted: bool) -> Iterator[tuple[str, float]]:
    tokens = sums[0]
    kl, k3, difference, p, q, p2, q2, pq, *of_weights = (value / tokens for value in sums[1:])
    yield "tokens", tokens
    yield "share", tokens / total
    yield "kl", kl
    yield "kl_k3", k3
    if weighted:
        mean, square, above = of_weights
        yield "weight_mean", mean
        yield "effective", mean**2 / square if square else 0.0
        yield "truncated", above
    yield "prob_diff", difference
    spread = (p2 - p**2) * (q2 - q**2)
    if spread > 0:
        yield "prob_correlation", (pq - p * q) / math.sqrt(spread)


class _Step:
    """What this process's trainer is doing: the rows whose advantages it computes, and the sums of the step."""

    def __init__(self) -> None:
        self.tags: Sequence[Mapping[str, Any]] | None = None
        self.version = 0
        self.mini_batches = 1
        self.last = True
        self.tally = Tally()
        self.again = Tally()
        self.last_kl = 0.0

    def of(self, mask: Any) -> Counts | None:
        """Staleness of the tokens of `mask` [rows, longest], row after row; None outside of an asynchronous step."""
        import numpy as np

        if self.tags is None:
            return None
        counts = mask.sum(-1).tolist()
        found = [versions(tag, int(count)) for tag, count in zip(self.tags, counts, strict=True) if count]
        known = [one for one in found if one is not None]
        return self.version - np.concatenate(known) if known and len(known) == len(found) else None


_STEP = _Step()


def mini_batches() -> int:
    """The number of batches in which this process's trainer computes the advantages of a step."""
    return _STEP.mini_batches


def last_mini_batch() -> bool:
    """Whether the batch whose advantages are computed is the last one of the step."""
    return _STEP.last


def of_rows(mask: Any) -> Any:
    """Staleness [rows, longest] as int16 of the batch whose advantages are computed, 0 outside of `mask`.

    None where the trainer is synchronous, or the version of some token is not known.
    """
    import torch

    found = _STEP.of(mask)
    if found is None:
        return None
    padded = torch.zeros(mask.shape, dtype=torch.int16)
    padded[mask.bool().cpu()] = torch.from_numpy(found).to(torch.int16)
    return padded


def watch(trainer: Any) -> None:
    """Let an asynchronous trainer of verl's log the figures of each staleness (idempotent); `report` computes them.

    Raises RuntimeError for a verl other than 0.9.1.
    """
    base: Any = type(trainer)
    if trainer.trainer_mode == "sync" or getattr(base, "_flashrl_staleness", False):
        return
    _require_verl()

    if trainer.trainer_mode == "separate_async":
        base = scoring_again(base)

    class Watched(base):
        """A trainer of verl's that knows which rows it computes advantages of."""

        _flashrl_staleness = True

        def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
            _STEP.tally, _STEP.again = Tally(), Tally()
            batch = super().step(metrics, timing_raw)
            _STEP.last_kl = _STEP.tally.least_kl()
            metrics.update(_STEP.tally.figures() | _STEP.again.figures(contract.FRESH))
            return batch

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            _STEP.tags, _STEP.version, _STEP.mini_batches = batch.tags, self.global_steps - 1, self.parameter_sync_step
            _STEP.last = self.local_trigger_step >= self.parameter_sync_step - 1
            try:
                return super()._compute_advantage(batch, metrics)
            finally:
                _STEP.tags = None

    trainer.__class__ = Watched


def scoring_again(base: Any) -> Any:
    """A trainer of verl's for separate_async that scores some responses of its engines again.

    It does so before the first log-probs of a step, every `EVERY` steps and after a step whose tokens were `FAR` off,
    unless the batch has tokens of staleness 0. The first step of an attempt has no earlier weights.
    """

    class Scoring(base):
        _kept: int | None = None
        """The version of the weights that verl keeps on the CPU."""
        _due = 0
        """The step from which responses are scored again."""

        def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
            if self.local_trigger_step == 0:
                current = self.global_steps - 1
                due = self.global_steps >= self._due or _STEP.last_kl > FAR
                if self._kept is not None and due and tokens_of(batch.tags, current) < contract.ENOUGH:
                    self._score_again(batch, self._kept)
                self._kept = current
            return super()._compute_old_log_prob(batch, metrics)

        def _score_again(self, batch: Any, version: int) -> None:
            rows = dict(zip(batch.keys, batch.tags, strict=True)) | self.replay_buffer.partitions["train"]
            rollout, workers = self.config.actor_rollout_ref.rollout, self.actor_rollout_wg
            # a pass of each process takes so many rows (verl/workers/engine/utils.py:125)
            size = 1 if rollout.log_prob_use_dynamic_bsz else rollout.log_prob_micro_batch_size_per_gpu
            unit = size * (max(workers._dispatch_info["actor"]) + 1)
            chosen = rows_to_score(rows, version, unit, seed=self.global_steps)
            if not chosen:
                return
            self._due = self.global_steps + EVERY
            workers.save_model_to_cpu(_NOW)
            workers.restore_model_from_cpu(_KEPT)
            try:
                score(self, {key: rows[key] for key in chosen}, version)
            except Exception as error:  # noqa: BLE001  (of TransferQueue and verl's workers: it is a measurement only)
                contract.logger().warning("no response is scored again: %s: %s", type(error).__name__, error)
            finally:
                workers.restore_model_from_cpu(_NOW)
                workers.clear_cpu_model(_NOW)

    return Scoring


def tokens_of(tags: Iterable[Mapping[str, Any]], version: int) -> int:
    """The number of tokens that a version sampled of the responses in rows with these tags."""
    pieces = (tag.get(VERSIONS) or [[tag.get(FIRST), tag["response_len"]]] for tag in tags if not _is_padding(tag))
    return sum(tokens for listed in pieces for number, tokens in listed if number == version)


def _is_padding(tag: Mapping[str, Any]) -> bool:
    """Whether a row is one by which verl fills a batch up (verl/trainer/ppo/padding_utils.py:136)."""
    return bool(tag.get("is_padding", False))


def rows_to_score(rows: Mapping[str, Mapping[str, Any]], version: int, unit: int, seed: int) -> list[str]:
    """Keys of complete responses with tokens of a version, drawn at random: `ROWS` or fewer, a multiple of `unit`.

    Where the unit is larger than ROWS they are as many as a unit has.
    """
    import random

    ready = sorted(key for key, tag in rows.items() if tag.get("status") == "success" and tokens_of([tag], version))
    count = min(len(ready), max(ROWS, unit)) // unit * unit
    return random.Random(seed).sample(ready, count)


def score(trainer: Any, rows: Mapping[str, Mapping[str, Any]], version: int) -> None:
    """Add the tokens of a version in rows of TransferQueue to what was scored again, by the trainer's weights.

    Copies of the rows are scored, so that no other gets the fields of the result.
    """
    import transfer_queue as tq
    import verl.trainer.ppo.rollout_corr_helper as verls
    from verl.workers.utils.padding import response_from_nested

    keys, where = [f"{_NOW}{key}" for key in rows], "train"
    data = tq.kv_batch_get(keys=list(rows), partition_id=where)
    batch = tq.kv_batch_put(keys=keys, partition_id=where, fields=data, tags=[dict(tag) for tag in rows.values()])
    try:
        batch.extra_info.update(
            calculate_entropy=False,
            compute_loss=False,
            temperature=trainer.config.actor_rollout_ref.rollout.temperature,
        )
        trainer.actor_rollout_wg.compute_log_prob(batch)
        fields = ["log_probs", "response_mask", "rollout_log_probs"]
        data = tq.kv_batch_get(keys=keys, partition_id=where, select_fields=fields)
    finally:
        tq.kv_clear(keys=keys, partition_id=where)
    data["log_probs"] = response_from_nested(data["log_probs"], data["response_mask"])
    found = data.to_padded_tensor()
    mask, settings = found["response_mask"], trainer.config.algorithm.rollout_correction
    counts = mask.sum(-1).tolist()
    of = [versions(tag, int(count)) for tag, count in zip(rows.values(), counts, strict=True)]
    inside = mask.bool()
    chosen = mask.new_zeros(mask.shape)
    chosen[inside] = mask.new_tensor([int(number == version) for one in of if one is not None for number in one])
    given = (found["log_probs"], found["rollout_log_probs"], chosen)
    kind = {"rollout_is": settings.rollout_is, "rollout_is_threshold": settings.rollout_is_threshold}
    weights, *_ = verls.compute_rollout_correction_and_rejection_mask(*given, **kind)
    _add(_STEP.again, mask.new_zeros(int(chosen.sum())).cpu().numpy(), *given, weights, kind)


def report() -> None:
    """Add up the tokens of each staleness where verl computes its metrics of the correction (idempotent).

    `compute_rollout_correction_and_rejection_mask` has log-probs, mask before rejection and weights
    (verl/trainer/ppo/rollout_corr_helper.py:786 in 0.9.1; no upstream issue asks for figures by version). Nothing
    changes for synchronous trainers. Raises RuntimeError for a verl other than 0.9.1.
    """
    _require_verl()
    import verl.trainer.ppo.rollout_corr_helper as verls

    original = verls.compute_rollout_correction_and_rejection_mask
    if getattr(original, PATCHED, False):
        return

    def compute_rollout_correction_and_rejection_mask(
        old_log_prob: Any, rollout_log_prob: Any, response_mask: Any, **settings: Any
    ) -> Any:
        found = original(old_log_prob, rollout_log_prob, response_mask, **settings)
        stale = _STEP.of(response_mask)
        if stale is not None:
            _add(_STEP.tally, stale, old_log_prob, rollout_log_prob, response_mask, found[0], settings)
        return found

    setattr(compute_rollout_correction_and_rejection_mask, PATCHED, True)
    verls.compute_rollout_correction_and_rejection_mask = compute_rollout_correction_and_rejection_mask


def _add(
    tally: Tally, stale: Counts, trainer: Any, rollout: Any, mask: Any, weights: Any, settings: Mapping[str, Any]
) -> None:
    """Add the tokens of `mask` to a tally; `weights` are what verl made of them by its `settings`, None without."""
    tokens, applied, above = mask.bool(), None, None
    if weights is not None:
        applied = _numpy(weights.batch["rollout_is_weights"][tokens])
        above = _above(trainer - rollout, mask, settings)
    tally.add(stale, _numpy(trainer[tokens]), _numpy(rollout[tokens]), applied, above)


def _above(log_ratios: Any, mask: Any, settings: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Whether the weight of each token is above the cap before truncation, as verl judges (:566-596, :728)."""
    import verl.trainer.ppo.rollout_corr_helper as verls

    cap, _ = verls._parse_rollout_is_threshold(settings["rollout_is_threshold"])
    if settings["rollout_is"] == "sequence":
        log_ratios = (log_ratios * mask).sum(-1, keepdim=True).expand_as(log_ratios)
    ratios = log_ratios.clamp(-verls.SAFETY_BOUND, verls.SAFETY_BOUND).exp()
    found: NDArray[np.bool_] = (ratios > cap)[mask.bool()].cpu().numpy()
    return found


def _numpy(tensor: Any) -> Floats:
    found: Floats = tensor.detach().double().cpu().numpy()
    return found


def _require_verl() -> None:
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl knows the versions of tokens with verl {VERL} only")
