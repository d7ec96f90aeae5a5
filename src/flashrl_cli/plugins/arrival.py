"""How much of each weight update arrives in the 8-bit weights of a rollout engine, measured on a sample of their rows.

An update of RL is much smaller than the step between two 8-bit codes: at a learning rate of 1e-6 a code changes only
where its weight happened to be next to the border between two codes. QuRL (arXiv 2602.13953) describes the effect. With
W for a sampled row as the engine receives it, Q for its codes times its scale, and t, t - 1 and 0 for this refit, the
previous one and the first one of the process, the figures of a refit are, over all sampled weights,

    codes_changed    share of the 8-bit codes of t that differ from those of t - 1
    weights_changed  the same share of the received bf16 weights
    arrived          <Q_t - Q_0, W_t - W_0> / <W_t - W_0, W_t - W_0>: how much of the change arrived, on average
    update_cosine    the same product divided by both lengths: how much of what changed in the engine is the change

Each row of each 8-bit weight is sampled with the same probability: of every `stride` rows of a layer one, the first at
random with the layer's name as seed, so that each refit of each replica compares the same rows. Nothing but the sample
is kept: of each weight in it 3 bytes of the first refit and of the last one.

verl's naive weight update drops what the workers return. So the engine's client in the rollout server keeps the last
answers, and the trainer asks the servers for them where verl collects metrics of weight updates.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL

if TYPE_CHECKING:
    from flashrl_cli.plugins.linear import OnlineLinearMethod

SAMPLE = 1 << 21
"""Weights of an engine's process that are compared, about; all weights of a model that has no more."""


@dataclass(frozen=True)
class SampledRows:
    """Rows of equal length: bf16 weights [N, K], their codes [N, K] and scales [N, 1], on the device.

    The codes are of weights that were rotated by `block` (plugins/rotation.py), 0 for none.
    """

    weights: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    block: int

    def values(self) -> torch.Tensor:
        """The weights that the codes stand for, rotated back, in float32."""
        from flashrl_cli.plugins.rotation import rotated

        held = self.codes.float() * self.scales
        return rotated(held, self.block) if self.block else held


Sample = Mapping[int, SampledRows]
"""Sampled rows by their length."""


class Arrival:
    """Compares a sample of the rows of a model's 8-bit weights from refit to refit."""

    def __init__(self, model: torch.nn.Module) -> None:
        from flashrl_cli.plugins.linear import OnlineLinearMethod

        methods = {name: getattr(layer, "quant_method", None) for name, layer in model.named_modules()}
        self._methods: dict[str, OnlineLinearMethod] = {
            name: method
            for name, method in methods.items()
            if isinstance(method, OnlineLinearMethod) and method.quantized_bytes
        }
        self.stride = max(1, sum(method.quantized_bytes for method in self._methods.values()) // SAMPLE)
        self._offsets = {name: random.Random(name).randrange(self.stride) for name in self._methods}
        self._taken: dict[tuple[str, int], SampledRows] = {}
        self._first: Sample | None = None
        self._last: Sample | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context of a refit, in which the sampled rows are copied as they are quantized."""
        self._taken.clear()
        for name, method in self._methods.items():
            method.on_rows = functools.partial(self._take, name)
        try:
            yield
        finally:
            for method in self._methods.values():
                method.on_rows = None

    def _take(self, name: str, start: int, weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        first = (self._offsets[name] - start) % self.stride
        if first < len(weight):
            rows = slice(first, None, self.stride)
            self._taken[name, start + first] = SampledRows(
                weight[rows].clone(), codes[rows].clone(), scales[rows].clone(), self._methods[name].block
            )

    def figures(self) -> dict[str, float] | None:
        """The figures of the refit that was watched; None after the first one, and without 8-bit weights.

        `sampled` is the number of weights that were compared, and `codes_error` and `arrived_error` are standard
        errors. What has no value, because no weight has changed, is left out.
        """
        before, first, now = self._last, self._first, _joined(self._taken)
        self._taken.clear()
        self._last, self._first = now, first or now
        if not (before and first):
            return None
        rows = torch.cat([_compared(now[length], before[length], first[length]) for length in now]).double().cpu()
        size, codes, weights, both, theirs, mine = rows.sum(0).tolist()
        found = {
            "sampled": int(size),
            "codes_changed": codes / size,
            "codes_error": _ratio_error(rows[:, 1], rows[:, 0], self.stride),
            "weights_changed": weights / size,
        }
        if theirs:
            found["arrived"] = both / theirs
            found["arrived_error"] = _ratio_error(rows[:, 3], rows[:, 4], self.stride)
        if theirs and mine:
            found["update_cosine"] = both / math.sqrt(theirs * mine)
        return found


def _joined(taken: Mapping[tuple[str, int], SampledRows]) -> Sample:
    """All sampled rows, in an order that does not depend on the order or the number of writes."""
    found: dict[int, list[SampledRows]] = {}
    for key in sorted(taken):
        found.setdefault(taken[key].weights.shape[1], []).append(taken[key])
    return {
        length: SampledRows(
            torch.cat([one.weights for one in rows]),
            torch.cat([one.codes for one in rows]),
            torch.cat([one.scales for one in rows]),
            rows[0].block,  # which is that of all layers
        )
        for length, rows in found.items()
    }


def _compared(now: SampledRows, before: SampledRows, first: SampledRows) -> torch.Tensor:
    """For each row, in float32 [N, 6]: its length, changed codes, changed weights, and three products of changes."""
    wanted = now.weights.float() - first.weights.float()
    got = now.values() - first.values()
    changed = (now.codes.float() != before.codes.float(), now.weights != before.weights)
    return torch.stack(
        [
            torch.full_like(now.scales[:, 0], now.weights.shape[1]),
            *(each.sum(1).float() for each in changed),
            *((a * b).sum(1) for a, b in ((got, wanted), (wanted, wanted), (got, got))),
        ],
        dim=1,
    )


def _ratio_error(values: torch.Tensor, sizes: torch.Tensor, stride: int) -> float:
    """Standard error of the ratio of two sums over a sample of one row in `stride`; 0 for all rows.

    W. G. Cochran, Sampling Techniques, 1977, section 6.4, with rows as units: weights of a row share their scale.
    """
    total, count = float(sizes.sum()), len(sizes)
    left = values - sizes * (float(values.sum()) / total)
    return math.sqrt(float(left.square().sum()) * count / max(1, count - 1) * (1 - 1 / stride)) / total


ANSWERS = "_flashrl_answers"
"""Attribute of vLLM's AsyncLLM: what its workers returned from the last weight update."""
UPDATE = "update_weights_from_ipc"
"""The method of a worker extension that verl calls for a weight update."""


def keep_answers() -> None:
    """Let vLLM's client in verl's rollout server keep what the workers return from a weight update (idempotent).

    `vLLMHttpServer.collective_rpc` drops it (verl/workers/rollout/vllm_rollout/vllm_async_server.py:256 in 0.9.1). Ray
    binds an actor's methods before the plugin is loaded, so the client is the place. Raises RuntimeError for a version
    of vLLM that is not supported.
    """
    import vllm
    from vllm.v1.engine.async_llm import AsyncLLM

    contract.require_vllm(vllm.__version__)
    original = AsyncLLM.collective_rpc
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    async def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        found = await original(self, method, *args, **kwargs)
        if method == UPDATE:
            setattr(self, ANSWERS, found)
        return found

    setattr(collective_rpc, PATCHED, True)
    AsyncLLM.collective_rpc = collective_rpc


def answers(server: Any) -> list[dict[str, float] | None]:
    """What the workers of a rollout server returned from the last weight update; called in the server's actor."""
    return getattr(server.engine, ANSWERS, None) or []


def pooled(found: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """Means of the shares over the workers that have any, under the names of verl's log; empty if none has.

    Replicas hold the same weights; tensor-parallel ranks hold parts of equal size.
    """
    workers = [one for one in found if one]
    values = {name: [one[name] for one in workers if name in one] for name in contract.ARRIVAL}
    return {f"{contract.REFIT}{name}": sum(each) / len(each) for name, each in values.items() if each}


def log_arrival(trainer: Any) -> None:
    """Let a trainer of verl's log the figures of each weight update with the step that made it (idempotent).

    `_consume_sync_metrics` is where verl merges metrics of weight updates into those of a step, for backends that have
    some (verl/trainer/ppo/v1/trainer_base.py:674 in 0.9.1). The naive backend, which trainers and engines on the same
    devices use, has none (verl/checkpoint_engine/base.py:520). Raises RuntimeError for a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl logs what arrived of an update with verl {VERL} only")
    base: Any = type(trainer)
    if getattr(base, PATCHED, False):
        return

    class Logging(base):
        """A trainer of verl's that asks its rollout servers what arrived."""

        def _consume_sync_metrics(self) -> dict[str, Any]:
            import ray

            found: dict[str, Any] = super()._consume_sync_metrics()
            managers = self._rollout_server_managers()
            servers = [replica.server_handle for manager in managers for replica in manager.get_replicas()]
            listed = ray.get([server.__ray_call__.remote(answers) for server in servers])
            return found | pooled([one for each in listed for one in each])

    setattr(Logging, PATCHED, True)
    trainer.__class__ = Logging
