"""verl's agent loop with fewer messages and less work for each response.

For every response stock verl 0.9.1 builds an agent loop through Hydra, tokenizes the prompt, asks the load balancer for
a server, sends a request to a reward worker, and stores one row in TransferQueue
(verl/experimental/agent_loop/agent_loop.py:652, verl/trainer/ppo/v1/agent_loop_tq.py:169): some 10 ms of a process,
which bound the rollout of many short responses. verl finds the manager of this module through its hook
`actor_rollout_ref.rollout.agent.agent_loop_manager_class`, and the agent loops, reward managers and rows stay verl's:

- responses that end at about the same time are scored and stored together, by one request each (`Together`);
- one agent loop serves all single-turn responses, and tokenizes each prompt once;
- the load balancer is not asked where there is only one server.

Agent loops of other kinds, traced rollouts, models with a processor, and reward managers that are not known to score
rows of a padded batch take verl's own way in these respects.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.metadata
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

from flashrl_cli.contract import VERL
from flashrl_cli.plugins import staleness

LONGEST_WAIT_S = 0.05
"""Seconds for which a response waits for an earlier request to end before it is sent in one of its own."""
PADDED_MANAGERS = ("naive", "dapo", "gdpo")
"""verl's reward managers that read only the response of a row, up to its attention mask's end
(verl/experimental/reward_loop/reward_manager/naive.py:37).
"""
SCORED = ("data_source", "reward_model", "extra_info")
"""Columns of the data that these managers read."""
PROMPTS = 128
"""Prompts whose tokens a worker remembers; the responses of one ask for them one after another."""


class Together:
    """Handles items in calls for several at once: those that arrive while earlier calls run go into the next one.

    `work(kind, items)` returns a result for each of the items, which are of one kind. At most `calls` of them run at a
    time for each kind, unless an item has waited for LONGEST_WAIT_S. If a call for several items fails, they are
    handled one by one, so that only the item with an error fails.
    """

    def __init__(self, work: Callable[[Any, list[Any]], Awaitable[Sequence[Any]]], calls: int = 1) -> None:
        self._work, self._calls = work, calls
        self._waiting: dict[Hashable, deque[tuple[Any, asyncio.Future[Any]]]] = {}
        self._running: dict[Hashable, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, kind: Hashable, item: Any) -> Any:
        """The result of an item; raises what its call raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        waiting = self._waiting.setdefault(kind, deque())
        waiting.append((item, future))
        if len(waiting) == 1:
            # by then the other coroutines that can run now have added their items
            loop.call_soon(self._start, kind)
        return await future

    def _start(self, kind: Hashable, late: asyncio.Future[Any] | None = None) -> None:
        """Begin as many calls as may run, with equal shares of the items; one more if `late` still waits."""
        waiting = self._waiting[kind]
        while waiting:
            free = self._calls - self._running.get(kind, 0)
            if free <= 0 and waiting[0][1] is not late:
                loop = asyncio.get_running_loop()
                loop.call_later(LONGEST_WAIT_S, self._start, kind, waiting[0][1])
                return
            share = -(-len(waiting) // max(free, 1))
            self._begin(kind, [waiting.popleft() for _ in range(share)])

    def _begin(self, kind: Hashable, items: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        self._running[kind] = self._running.get(kind, 0) + 1
        task = asyncio.get_running_loop().create_task(self._run(kind, items))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, kind: Hashable, items: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            await self._handle(kind, items)
        finally:
            self._running[kind] -= 1
            self._start(kind)

    async def _handle(self, kind: Hashable, items: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            results = await self._work(kind, [item for item, _ in items])
        except Exception as error:  # noqa: BLE001 - of scorers and storage; who waits for the item gets it
            if len(items) > 1:
                await asyncio.gather(*(self._handle(kind, [one]) for one in items))
            elif not items[0][1].done():
                items[0][1].set_exception(error)
            return
        for (_, future), result in zip(items, results, strict=True):
            if not future.done():
                future.set_result(result)


class Puts:
    """The part of the module `transfer_queue` that verl's agent loop worker uses, with puts for several rows at once.

    `stacked` makes a TensorDict of a list of rows. In the worker's module verl's function of this purpose is replaced
    by one that leaves the list as it is, so that rows reach `async_kv_batch_put` as dictionaries.
    """

    def __init__(self, queue: Any, stacked: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._queue, self._stacked = queue, stacked
        self._tags, self._rows = Together(self._put_tags), Together(self._put_rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def async_kv_put(self, *, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        """Set the tag of a key."""
        await self._tags(partition_id, (key, tag))

    async def async_kv_batch_put(
        self, *, keys: list[str], fields: list[dict[str, Any]], tags: list[dict[str, Any]], partition_id: str
    ) -> None:
        """Store rows with their tags."""
        await asyncio.gather(
            *(
                self._rows((partition_id, layout(row)), (key, row, tag | staleness.tag_of(row)))
                for key, row, tag in zip(keys, fields, tags, strict=True)
            )
        )

    async def _put_tags(self, partition: str, items: list[tuple[str, dict[str, Any]]]) -> list[None]:
        keys, tags = zip(*items, strict=True)
        await self._queue.async_kv_batch_put(keys=list(keys), partition_id=partition, tags=list(tags))
        return [None] * len(items)

    async def _put_rows(
        self, kind: tuple[str, Any], items: list[tuple[str, dict[str, Any], dict[str, Any]]]
    ) -> list[None]:
        keys, rows, tags = zip(*items, strict=True)
        fields = self._stacked(list(rows))
        await self._queue.async_kv_batch_put(keys=list(keys), partition_id=kind[0], fields=fields, tags=list(tags))
        return [None] * len(items)


def layout(row: dict[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    """What rows have in common that can be stacked to tensors in which only the first dimension is ragged."""
    return tuple((name, getattr(value, "dtype", None), getattr(value, "shape", ())[1:]) for name, value in row.items())


class AgentLoopManager:
    """verl's manager of agent loops, with the workers of this module."""

    @staticmethod
    def create(*args: Any, **kwargs: Any) -> Any:
        """What verl's `AgentLoopManagerTQ.create` returns. Raises RuntimeError for a verl other than 0.9.1."""
        if importlib.metadata.version("verl") != VERL:
            raise RuntimeError(f"flashrl's agent loop workers are written for verl {VERL}")
        import ray
        from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

        class Manager(AgentLoopManagerTQ):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.agent_loop_workers_class = ray.remote(AgentLoopWorker)

        return Manager.create(*args, **kwargs)


class AgentLoopWorker:
    """The Ray actor, which makes its worker in its own process.

    Ray would copy the functions of a class that it does not find by its name, as verl's below the actor of the same
    name, together with the module's names as they were where the actor is created.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._worker = worker_class()(*args, **kwargs)

    async def generate_sequences(self, batch: Any) -> None:
        """Begin to generate a batch of prompts."""
        await self._worker.generate_sequences(batch)


def worker_class() -> Any:
    """verl's `AgentLoopWorkerTQ` as a class, extended by what this module does."""
    import verl.trainer.ppo.v1.agent_loop_tq as verls

    base = verls.AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__

    class Worker(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, llm_client: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, staleness.note_versions(one_server(config, llm_client)), *args, **kwargs)
            if not isinstance(verls.tq, Puts):
                verls.tq = Puts(verls.tq, verls.list_of_dict_to_tensordict)
                verls.list_of_dict_to_tensordict = list
            handles = self.reward_loop_worker_handles
            self._scores = Together(self._score, len(handles)) if handles and scores_padded(config) else None
            self._single_turn = single_turn_loop(self) if self.processor is None else None

        async def _run_agent_loop(
            self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, agent_name: str, **kwargs: Any
        ) -> None:
            if self._single_turn is None or not is_plain(agent_name):
                await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, **kwargs)
                return
            kwargs.pop("trace", None)
            output = await self._single_turn.run(sampling_params, **kwargs)
            await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)

        async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
            output = outputs[-1]
            if self._scores is None or len(outputs) > 1 or output.reward_score is not None:
                await super()._compute_score(outputs, kwargs)
                return
            from verl.utils.profiler import simple_timer

            timing: dict[str, float] = {}
            with simple_timer("compute_score", timing):
                columns = tuple(name for name in SCORED if name in kwargs)
                row = {name: kwargs[name] for name in columns}
                result = await self._scores(columns, (output, row))
                output.reward_score = result["reward_score"]
                output.extra_fields["reward_extra_info"] = result["reward_extra_info"]
            output.metrics.compute_score = timing["compute_score"]

        async def _score(self, columns: tuple[str, ...], items: list[tuple[Any, dict[str, Any]]]) -> Sequence[Any]:
            handle = random.choice(self.reward_loop_worker_handles)
            results: Sequence[Any] = await handle.compute_score_batch.remote(to_score(columns, items))
            return results

    return Worker


def is_plain(agent_name: str) -> bool:
    """Whether an agent loop is verl's own for a single turn, without settings and not traced."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.utils.rollout_trace import RolloutTraceConfig

    name = f"{SingleTurnAgentLoop.__module__}.{SingleTurnAgentLoop.__qualname__}"
    return _agent_loop_registry.get(agent_name) == {"_target_": name} and RolloutTraceConfig.get_backend() is None


def single_turn_loop(worker: Any) -> Any:
    """verl's agent loop for a single turn, for all text responses of a worker: it keeps nothing of a response."""
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    class Loop(SingleTurnAgentLoop):
        _tokens: dict[str, asyncio.Future[list[int]]]

        async def ct_build_initial_tokens(self, messages: Any, *args: Any, **kwargs: Any) -> list[int]:
            """The tokens of a prompt, once for all its responses."""
            key = repr(messages)
            found: asyncio.Future[list[int]] | None = self._tokens.get(key)
            if found is None:
                if len(self._tokens) >= PROMPTS:
                    del self._tokens[next(iter(self._tokens))]
                found = asyncio.ensure_future(super().ct_build_initial_tokens(messages, *args, **kwargs))
                self._tokens[key] = found
            return list(await asyncio.shield(found))

        async def ct_merge_assistant_token(
            self,
            runtime_token_ids: list[int],
            assistant_token_ids: list[int],
            response_mask: list[int],
            response_logprobs: list[float] | None = None,
            assistant_logprobs: list[float] | None = None,
        ) -> Any:
            """verl's method of this name without a thread, which costs more than joining two lists."""
            builder = self.continuous_token_builder
            merged = builder.merge_assistant_tokens(runtime_token_ids, assistant_token_ids)
            aligned = builder.align_response_metadata(
                merged, response_mask, response_logprobs, assistant_logprobs=assistant_logprobs
            )
            return merged, *aligned

    loop = Loop(
        trainer_config=DictConfigWrap(config=worker.config),
        server_manager=worker.llm_client,
        tokenizer=worker.tokenizer,
        processor=worker.processor,
        hf_model_type=worker.hf_model_type,
        dataset_cls=worker.dataset_cls,
        data_config=DictConfigWrap(worker.config.data),
    )
    loop._tokens = {}
    return loop


def scores_padded(config: Any) -> bool:
    """Whether the reward manager of a verl configuration is one that scores rows of a padded batch."""
    manager = config.reward.reward_manager
    return (
        manager.source == "register"
        and manager.name in PADDED_MANAGERS
        and not (config.reward.reward_model.enable and config.reward.custom_reward_function.path is None)
    )


def to_score(columns: tuple[str, ...], items: list[tuple[Any, dict[str, Any]]]) -> Any:
    """A DataProto of responses [rows, longest] and what their rewards depend on, as verl sends them one by one."""
    import numpy as np
    import torch
    from tensordict import TensorDict
    from verl.protocol import DataProto

    rows = [torch.tensor(output.response_ids, dtype=torch.int64) for output, _ in items]
    responses = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(responses.shape[1]) < lengths[:, None]).long()

    def column(values: list[Any]) -> Any:
        found: Any = np.empty(len(values), dtype=object)
        for place, value in enumerate(values):
            # verl sends each value in an array of one, which makes NumPy's scalars of Python's
            found[place] = np.array([value])[0]
        return found

    # a reward manager adds to the dictionaries of a row, which those of one prompt share here
    others = {name: column([copy.deepcopy(row[name]) for _, row in items]) for name in columns}
    others["__num_turns__"] = column([output.num_turns for output, _ in items])
    others["tool_extra_fields"] = column([output.extra_fields for output, _ in items])
    batch = TensorDict({"responses": responses, "attention_mask": mask}, batch_size=len(items))
    return DataProto(batch=batch, non_tensor_batch=others)


def one_server(config: Any, client: Any) -> Any:
    """A client that does not ask the load balancer if it has a single server, which is the same for all of a run.

    Only the synchronous trainer keeps its servers, and only verl's own balancer is known to do nothing more than
    choose one.
    """
    from verl.workers.rollout.llm_server import LLMServerClient

    rollout = config.actor_rollout_ref.rollout
    fixed = config.trainer.v1.trainer_mode == "sync" and rollout.get("router_config_path") is None
    if type(client) is not LLMServerClient or not fixed:
        return client

    class OneServerClient(LLMServerClient):
        _only: tuple[str, Any] | None = None
        _asked = False

        async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
            if self._only is not None:
                return self._only
            found: tuple[str, Any] = await super()._acquire_server(request_id, **extra)
            if not self._asked:
                self._asked = True
                if len(await self._load_balancer.get_all_servers.remote()) == 1:
                    self._only = found
            return found

        def _release_server(self, server_id: str, request_id: str | None = None) -> None:
            if self._only is None:
                super()._release_server(server_id, request_id)

    client.__class__ = OneServerClient
    return client
