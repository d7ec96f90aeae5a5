"""Fewer and smaller messages between vLLM's engine and verl's rollout server.

vLLM hands over every token of every sequence as soon as it is sampled, as an online service needs it: each passes from
the engine's process to the server's with its log-prob in three NumPy arrays, is decoded to text, and makes an output
object that wakes the coroutine of its request. verl reads the ids and log-probs of complete responses only
(verl/workers/rollout/vllm_rollout/vllm_async_server.py:672 in 0.9.1). With many short responses at once this Python
work, not the model, bounds the rollout.

Two changes, one for each side. The engine keeps the tokens of a sequence until there are `stream_interval` of them
(vLLM's own option, which it applies only after a token has crossed between the processes:
vllm/v1/engine/output_processor.py:287 in 0.24), and verl's server asks for ids instead of text.
"""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL

SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"
"""verl's module with the rollout server (class vLLMHttpServer)."""
ENGINE = "vllm.v1.engine.core"
"""vLLM's module with the process of the engine (class EngineCoreProc)."""
_TOKENS = frozenset({"request_id", "new_token_ids", "new_logprobs", "trace_headers", "num_nans_in_logits"})
"""Fields of vLLM's EngineCoreOutput that an output which only carries tokens may set."""
LONGEST_SLEEP_MS = 1
"""Milliseconds that an engine on a CPU sleeps between two looks for a message that it was not notified of."""
_ARRAY = "routed_experts"
"""The one field with a NumPy array, which cannot be compared in a tuple."""


def apply() -> None:
    """Apply both changes, each in the processes that it concerns (idempotent); called by vLLM's plugin."""
    if SERVER in sys.modules:
        ask_for_ids()
    if ENGINE in sys.modules:
        keep_tokens()


def ask_for_ids() -> None:
    """Let verl's server ask vLLM for token ids and log-probs without text (idempotent).

    `vLLMHttpServer.generate` makes the SamplingParams of each request and never reads the text of the output. A request
    with stop strings is decoded all the same, because vLLM finds them in the text. `flat_logprobs` keeps log-probs in
    lists of numbers instead of one dictionary and one object a token; verl indexes both alike. Raises RuntimeError for
    a verl other than 0.9.1.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl makes requests for ids with verl {VERL} only")
    server: Any = sys.modules[SERVER]
    original = server.SamplingParams
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def sampling_params(**settings: Any) -> Any:
        ids = {"flat_logprobs": True, "detokenize": bool(settings.get("stop"))}
        return original(**{**ids, **settings})

    setattr(sampling_params, PATCHED, True)
    server.SamplingParams = sampling_params


def keep_tokens() -> None:
    """Let the engine send tokens when a sequence has `stream_interval` new ones or ends (idempotent).

    The first token of a sequence is sent at once: verl's server takes it as the sign that a request was admitted
    (vllm_async_server.py:676). Requests with stop strings are sent token by token, because the server's process finds
    the strings and ends them. Tokens of requests that the engine aborts are sent before the news of the abortion.
    Raises RuntimeError for a version of vLLM that is not supported.
    """
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc

    contract.require_vllm(vllm.__version__)
    original, finish = Scheduler.update_from_output, EngineCoreProc._send_finish_outputs_to_client
    if getattr(original, PATCHED, False):
        return
    others = carried(EngineCoreOutput)

    def keeper(scheduler: Any) -> Keeper:
        found: Keeper = vars(scheduler).setdefault("_flashrl_keeper", Keeper(others))
        return found

    @functools.wraps(original)
    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> dict[int, Any]:
        found: dict[int, Any] = original(self, *args, **kwargs)
        interval = self.scheduler_config.stream_interval
        if interval > 1:
            for client, message in list(found.items()):
                message.outputs = list(keeper(self).due(message.outputs, self.requests, interval))
                if not (message.outputs or message.finished_requests or message.scheduler_stats):
                    del found[client]
            keeper(self).forget_all_but(self.requests)
        return found

    @functools.wraps(finish)
    def send_finish_outputs(self: Any, req_ids: list[str], *args: Any, **kwargs: Any) -> None:
        client = args[0] if args else kwargs["client_index"]
        if last := [
            EngineCoreOutput(name, kept.tokens, new_logprobs=merged(kept.logprobs))
            for name in req_ids
            if (kept := keeper(self.scheduler).take(name))
        ]:
            self.output_queue.put_nowait((client, EngineCoreOutputs(outputs=last)))
        finish(self, req_ids, *args, **kwargs)

    setattr(update_from_output, PATCHED, True)
    Scheduler.update_from_output = update_from_output
    EngineCoreProc._send_finish_outputs_to_client = send_finish_outputs


def sleep_between_messages() -> None:
    """Let the processes of an engine on a CPU sleep while they wait for each other's messages (idempotent).

    Engine and worker exchange messages through shared memory. For a second after each message the reader looks for the
    next one in a busy loop, which takes a core from the processes that it waits for
    (vllm/distributed/device_communicators/shm_broadcast.py:203 in 0.28). Here it waits for the writer's notification
    in between, though for a millisecond at most: a notification that follows another one too soon is dropped, since
    the socket's queue holds one (:168). Raises RuntimeError for a version of vLLM that is not supported.
    """
    import vllm
    import zmq
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    contract.require_vllm(vllm.__version__)
    original = SpinCondition.wait
    if getattr(original, PATCHED, False):
        return

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        if time.monotonic() > self.last_read + self.busy_loop_s:
            original(self, timeout_ms)
        elif self.local_notify_socket in dict(self.poller.poll(LONGEST_SLEEP_MS)):
            self.local_notify_socket.recv(flags=zmq.NOBLOCK, copy=False)

    setattr(wait, PATCHED, True)
    SpinCondition.wait = wait


def carried(output: Any) -> tuple[str, ...]:
    """The fields of vLLM's EngineCoreOutput that are None if it carries nothing but tokens."""
    return tuple(name for name in output.__struct_fields__ if name not in {*_TOKENS, _ARRAY})


class Kept:
    """New tokens of a sequence that were not sent yet, with their log-probs as the engine's steps gave them."""

    __slots__ = ("logprobs", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []

    def add(self, output: Any) -> None:
        self.tokens += output.new_token_ids
        if output.new_logprobs is not None:
            self.logprobs.append(output.new_logprobs)


class Keeper:
    """Keeps the tokens of sequences, by request id, until enough of them are there.

    `others` are the fields of an output that are None if it carries nothing but tokens, at least two.
    """

    def __init__(self, others: tuple[str, ...]) -> None:
        self._others: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*others)
        self._nothing = (None,) * len(others)
        self._kept: dict[str, Kept] = {}

    def due(self, outputs: Iterable[Any], requests: Mapping[str, Any], interval: int) -> Iterator[Any]:
        """Yield those of the engine's new `outputs` that are to be sent now, with what was kept of their sequences.

        `requests` are the scheduler's, which no longer has those that ended.
        """
        for output in outputs:
            name = output.request_id
            kept, request = self._kept.get(name), requests.get(name)
            if (
                request
                and self._others(output) == self._nothing
                and getattr(output, _ARRAY, None) is None
                and not request.sampling_params.stop
            ):
                if kept is None:
                    kept = self._kept[name] = Kept()
                kept.add(output)
                if len(kept.tokens) < interval:
                    continue
            elif kept:
                kept.add(output)
            if kept:
                output.new_token_ids, output.new_logprobs = kept.tokens, merged(kept.logprobs)
                del self._kept[name]
            yield output

    def take(self, name: str) -> Kept | None:
        """What was kept of a sequence, which is forgotten."""
        return self._kept.pop(name, None)

    def forget_all_but(self, requests: Mapping[str, Any]) -> None:
        """Forget sequences whose requests were aborted by the server, which expects nothing more of them."""
        for name in self._kept.keys() - requests.keys():
            del self._kept[name]


def merged(parts: list[Any]) -> Any:
    """The log-probs of consecutive tokens as one LogprobsLists of vLLM; None without log-probs.

    Each step has as many columns as one of its requests asked for, and every request reads its own first ones.
    """
    if len(parts) < 2:
        return parts[0] if parts else None
    import numpy as np

    ids, logprobs, ranks, _ = zip(*parts, strict=True)
    width = min(array.shape[1] for array in logprobs)
    columns = [np.concatenate([array[:, :width] for array in arrays]) for arrays in (ids, logprobs)]
    return type(parts[0])(*columns, np.concatenate(ranks))
