"""Agent loops with fewer messages: the same rows, rewards and states of prompts as from verl's own workers.

The child process below runs verl's worker and flashrl's on the same prompts. Ray's actors are objects of the process
that get copies of their arguments: verl's load balancer and reward worker, a server whose responses are complete all at
once, and a store that keeps rows as TransferQueue does.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Workshop

PROMPTS, COPIES = 8, 4
UNKNOWN, TWICE = "prompt-1", "prompt-2"
"""Prompts with a data source that verl cannot score, and with an agent loop of two outputs."""
CASES = {"one server": "naive", "two servers": "dapo"}
"""Reward managers by the servers that there are."""


class Handle:
    """An actor as its callers see it: arguments and results are copied, and calls are counted."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        async def call(args: bytes) -> Any:
            positional, named = pickle.loads(args)
            found = method(*positional, **named)
            return pickle.loads(pickle.dumps(await found if asyncio.iscoroutine(found) else found))

        def remote(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return asyncio.ensure_future(call(pickle.dumps((args, kwargs))))

        return SimpleNamespace(remote=remote)


class Server:
    """Gives a prompt's responses in an order of its own, all at once as soon as `expected` requests have arrived."""

    def __init__(self, expected: int) -> None:
        self._left, self._all, self._seen = expected, asyncio.Event(), {}  # type: ignore[var-annotated]

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        assert sampling_params["logprobs"]
        count = self._seen[tuple(prompt_ids)] = self._seen.get(tuple(prompt_ids), 0) + 1
        self._left -= 1
        if self._left == 0:
            self._all.set()
        await self._all.wait()
        draw = random.Random(f"{prompt_ids} {count}")
        tokens = [draw.randrange(48, 58) for _ in range(draw.randint(1, 16))]
        logprobs = [-draw.random() for _ in tokens]
        extra = {"global_steps": 3, "num_cached_tokens": None}
        return TokenOutput(token_ids=tokens, log_probs=logprobs, stop_reason="completed", extra_fields=extra)


class Store:
    """What a worker puts into TransferQueue, split into rows as by its storage manager."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, Any]] = {}
        self.puts = 0

    def init(self) -> None:
        """TransferQueue is there."""

    async def async_kv_put(self, *, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        await self.async_kv_batch_put(keys=[key], partition_id=partition_id, tags=[tag])

    async def async_kv_batch_put(
        self, *, keys: list[str], partition_id: str, tags: list[dict[str, Any]], fields: Any = None
    ) -> None:
        from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager as Manager

        assert partition_id == "train"
        self.puts += 1
        await asyncio.sleep(0)
        for place, (key, tag) in enumerate(zip(keys, tags, strict=True)):
            self.tags[key] = {**self.tags.get(key, {}), **tag}
            if fields is not None:
                columns = fields.keys()
                one = {name: Manager._select_by_positions(fields[name], [place])[0] for name in columns}
                self.rows[key] = pickle.loads(pickle.dumps(one))


def batch_of(job: dict[str, Any], config: Any, tokenizer: Any, turn: int) -> Any:
    """Prompts as verl's trainer hands them to its agent loop manager; in the first turn one that cannot be scored."""
    import numpy as np
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    data = RLHFDataset(job["data"], tokenizer, config.data)
    columns = collate_fn([data[place] for place in range(PROMPTS)])
    columns["uid"] = np.array([f"prompt-{place}{'-later' * turn}" for place in range(PROMPTS)], dtype=object)
    if turn == 0:
        columns["data_source"][1] = "nobody's"
    columns["agent_name"] = np.array(["single_turn_agent"] * PROMPTS, dtype=object)
    columns["agent_name"][2] = "two_outputs"
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", 3)
    return batch


def add_agent_loop() -> None:
    """An agent loop of another kind, whose responses are two rows: one backwards, and one as it is."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    class TwoOutputs(SingleTurnAgentLoop):  # type: ignore[misc]
        async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
            output = await super().run(sampling_params, **kwargs)
            backwards = output.model_copy(deep=True)
            backwards.response_ids.reverse()
            return [backwards, output]

    globals()["TwoOutputs"] = TwoOutputs
    _agent_loop_registry["two_outputs"] = {"_target_": f"{__name__}.TwoOutputs"}


async def rows_of(made: Any, case: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a worker of a class stores of two batches, and how many messages it took."""
    import verl.trainer.ppo.v1.agent_loop_tq as verls
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.workers.rollout.llm_server import LLMServerClient
    from verl.workers.rollout.router import GlobalRequestLoadBalancer

    from flashrl_cli.verl import compose

    tree = compose.tree(job["overrides"])._config
    overlong = {"enable": True, "len": 8, "penalty_factor": 1.0, "log": True}
    settings = {"overlong_buffer_cfg": overlong, "max_resp_len": 16}
    OmegaConf.set_struct(tree, False)
    tree = OmegaConf.merge(tree, {"reward": {"reward_manager": {"name": CASES[case]}, "reward_kwargs": settings}})
    store = verls.tq = Store()
    scorer = Handle(RewardLoopWorker(tree))
    servers = {f"server {number}": number for number in range(2 if case == "two servers" else 1)}
    balancer = Handle(GlobalRequestLoadBalancer(servers))
    found: dict[str, Any] = {"messages": []}
    worker = None
    for turn in range(2):
        server = Handle(Server(PROMPTS * COPIES))
        balancer._actor._servers = dict.fromkeys(servers, None)
        client = worker.llm_client if worker else LLMServerClient(tree, balancer)
        worker = worker or made()(tree, client, None, [scorer])
        with_server(worker.llm_client, server)
        before = (store.puts, dict(balancer.calls), dict(scorer.calls))
        await worker.generate_sequences(batch_of(job, tree, worker.tokenizer, turn))
        await asyncio.gather(*worker.background_tasks)
        asked = balancer.calls.get("acquire_server", 0) - before[1].get("acquire_server", 0)
        scored = sum(scorer.calls.values()) - sum(before[2].values())
        found["messages"].append({"puts": store.puts - before[0], "asked": asked, "scored": scored})
    return found | {"rows": store.rows, "tags": store.tags}


def with_server(client: Any, server: Handle) -> None:
    """Let a client get this server, whichever the balancer chose."""
    acquire = type(client)._acquire_server

    async def acquire_server(request_id: str, **extra: Any) -> Any:
        name, _ = await acquire(client, request_id, **extra)
        return name, server

    client._acquire_server = acquire_server


def as_text(value: Any) -> str:
    """A value of a row with its type, so that equal text means equal bits."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{value.tolist()}"
    value = getattr(value, "data", value) if type(value).__name__.startswith("NonTensor") else value
    if isinstance(value, dict):
        times = ("generate_sequences", "compute_score")
        return str({key: as_text(one) for key, one in value.items() if key not in times})
    return f"{type(value).__name__} {value!r}"


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Rows by prompt without the order of its responses, and the tags of all keys."""
    rows: dict[str, list[Any]] = {}
    for key, row in found["rows"].items():
        uid, session, index = key.rsplit("_", 2)
        assert row.pop("session_id") == int(session)
        tag = found["tags"][key]
        rows.setdefault(uid, []).append([index, str(tag), {name: as_text(row[name]) for name in sorted(row)}])
    prompts = {key: tag for key, tag in found["tags"].items() if key not in found["rows"]}
    return {
        "rows": {uid: sorted(of, key=str) for uid, of in rows.items()},
        "keys": sorted(found["rows"]),
        "prompts": prompts,
        "messages": found["messages"],
    }


async def both(job: dict[str, Any]) -> dict[str, Any]:
    """What both workers store, in each case."""
    import verl.trainer.ppo.v1.agent_loop_tq as verls

    from flashrl_cli.plugins import agent_loop

    add_agent_loop()
    stacked = verls.list_of_dict_to_tensordict

    def stock() -> Any:
        return verls.AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__

    result: dict[str, dict[str, Any]] = {}
    for case in CASES:
        result[case] = {}
        for name, made in (("verl", stock), ("flashrl", agent_loop.worker_class)):
            verls.list_of_dict_to_tensordict = stacked
            result[case][name] = comparable(await rows_of(made, case, job))
    return result


@pytest.fixture(scope="module")
def found(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both workers store of the same prompts, by case."""
    folder = tmp_path_factory.mktemp("agent_loop")
    job, out = folder / "job.json", folder / "out.json"
    sets = ("--set", f"rollout.n={COPIES}")
    plan = json.loads(workshop.run("train", "--preset", "tiny", *sets, "--dry-run", "--json")[0])
    data = str(workshop.root / "data/tiny/test.parquet")
    job.write_text(json.dumps({"overrides": plan["overrides"], "data": data, "out": str(out)}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, __file__, str(job)],
        cwd=folder,
        env={**workshop.env, **plan["env"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_verl(found: dict[str, Any], case: str) -> None:
    right, ours = found[case]["verl"], found[case]["flashrl"]
    assert ours["rows"] == right["rows"]
    assert ours["keys"] == right["keys"]
    rewards = {row["rm_scores"] for rows in right["rows"].values() for _, _, row in rows}
    assert len(rewards) > 2, "rewards depend on the responses"
    twice = right["rows"][TWICE]
    assert [index for index, _, _ in twice] == ["0"] * COPIES + ["1"] * COPIES


@pytest.mark.parametrize("case", CASES)
def test_only_the_prompt_without_a_score_fails(found: dict[str, Any], case: str) -> None:
    right, ours = found[case]["verl"]["prompts"], found[case]["flashrl"]["prompts"]
    assert ours == right
    assert {uid for uid, tag in ours.items() if tag["status"] != "finished"} == {UNKNOWN}
    assert UNKNOWN not in found[case]["flashrl"]["rows"]


@pytest.mark.parametrize("case", CASES)
def test_messages_are_fewer(found: dict[str, Any], case: str) -> None:
    right, ours = found[case]["verl"]["messages"], found[case]["flashrl"]["messages"]
    for stock, one in zip(right, ours, strict=True):
        assert one["puts"] < stock["puts"] / 2
    assert [turn["asked"] for turn in right] == [PROMPTS * COPIES] * 2
    assert ours[1]["asked"] == (0 if case == "one server" else PROMPTS * COPIES)
    assert COPIES < ours[1]["scored"] < right[1]["scored"] / 2, "those of two outputs are scored in verl's own way"


if __name__ == "__main__":
    asked_job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked_job["out"]).write_text(json.dumps(asyncio.run(both(asked_job))), encoding="utf-8")
