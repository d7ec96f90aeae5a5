"""Importance weights have mean 1 under the rollout's own sampling; where sampling cuts tokens off, they have not.

With w = p_trainer / p_rollout of a sampled token, E[w] = 1 whatever the rollout's arithmetic is, if and only if the log-prob that
comes back is that of the distribution which was sampled from, and this one leaves no token of the trainer's out. The child process
below asks verl's own code for what is sampled with (`AgentLoopWorkerTQ`), for the engine and its answers (`vLLMHttpServer`, less Ray
and HTTP), and for how the trainer scales logits. Neighbours tried: temperatures, the model folder's generation_config.json, ignore_eos,
stop tokens and strings, a seed a request, penalties, logit_bias; and top-p, top-k, min-p, bad words, allowed tokens, min_tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.integration.conftest import Workshop

ROLLOUT = "actor_rollout_ref.rollout"
PROMPTS, COPIES = 64, 8
TOKENS = 16
ERRORS = 5.0
"""Standard errors that a mean may be off by: of the martingale sum of w - 1, whose terms are uncorrelated also within a response."""
ROUNDING = 1e-5
"""What float32 log-probs may be off by, the engine's and the trainer's together."""
DISHONEST = {
    "do_sample": True,
    "temperature": 0.3,
    "top_p": 0.5,
    "top_k": 2,
    "min_p": 0.3,
    "repetition_penalty": 1.7,
}
"""Sampling that a model folder recommends; vLLM's HTTP server would take it as its defaults."""
CASES: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.7": {"config": {"temperature": 0.7}},
    "temperature 1.3": {"config": {"temperature": 1.3}},
    "ignore_eos": {"config": {"temperature": 1.3, "ignore_eos": True}},
    "a token that stops": {"sampling": {"stop_token_ids": [20, 21, 22]}},
    "a text that stops": {"sampling": {"stop": ["1", "2"]}},
    "repetition penalty": {"sampling": {"repetition_penalty": 1.1}},
    "presence penalty": {"sampling": {"presence_penalty": 0.3}},
    "frequency penalty": {"sampling": {"frequency_penalty": 0.3}},
    "logit bias": {"sampling": {"logit_bias": {20: 0.5, 21: -0.5}}},
}
CUT: dict[str, dict[str, Any]] = {
    "top_p": {"config": {"top_p": 0.9}},
    "top_k": {"config": {"temperature": 1.3, "top_k": 2}},
    "min_p": {"sampling": {"min_p": 0.1}},
    "bad words": {"sampling": {"bad_words": ["1"]}},
    "allowed tokens": {"sampling": {"allowed_token_ids": list(range(256))}},
    "min_tokens": {"sampling": {"min_tokens": TOKENS}},
}


def rollout_server(tree: Any) -> Any:
    """verl's server of one engine, launched as verl does, but without an actor around it and a socket before it."""
    from verl.workers.rollout.vllm_rollout import vllm_async_server as verls

    async def no_socket(*_: object) -> tuple[int, None]:
        return 0, None

    class Server(verls.vLLMHttpServer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.config = self._init_config(tree.actor_rollout_ref.rollout)
            self.model_config = self._init_model_config(tree.actor_rollout_ref.model)
            self._validate_configs()
            self._disaggregation_role, self._server_address = "null", "127.0.0.1"
            self.node_rank = self.replica_rank = self._admitting = self._dp_master_port = 0
            self.nnodes = self.gpus_per_node = 1
            self.global_steps, self._submission_paused = None, False

        def _should_profile(self) -> bool:
            return False

    verls.run_uvicorn = no_socket
    return Server()


async def asked_for(config: Any) -> dict[str, Any]:
    """What verl's agent loop worker asks the server for in a training step."""
    import numpy as np
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
    from verl.utils import tensordict_utils as tu

    found: list[dict[str, Any]] = []

    async def note(_: object, sampling_params: dict[str, Any], **__: object) -> None:
        found.append(sampling_params)

    worker = SimpleNamespace(config=config, background_tasks=set(), _run_prompt=note)
    batch = tu.get_tensordict({"index": np.arange(1)}, {"global_steps": 1})
    await AgentLoopWorkerTQ.__ray_metadata__.modified_class.generate_sequences(worker, batch)
    await asyncio.gather(*worker.background_tasks)
    return found[0]


def trainers(policy: Any, temperature: float, prompt: list[int], response: list[int]) -> Any:
    """Log-probs of a response, float32, as verl's FSDP engine computes them of its model's logits."""
    import torch
    from verl.utils.torch_functional import logprobs_from_logits
    from verl.workers.engine.fsdp.transformer_impl import _is_scalar_unit_temperature, _scale_logits_by_temperature

    tokens = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = policy(tokens).logits[0, len(prompt) - 1 : -1]
    unit = _is_scalar_unit_temperature(temperature)
    logits = _scale_logits_by_temperature(logits, torch.tensor([[temperature]]), is_unit_temperature=unit)
    return logprobs_from_logits(logits, tokens[0, len(prompt) :])


async def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM

    tree = OmegaConf.create(job["tree"])
    server = rollout_server(tree)
    await server.launch_server()
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    result: dict[str, Any] = {}
    for name, case in job["cases"].items():
        OmegaConf.update(tree, ROLLOUT, case.get("config", {}), merge=True)
        given = {**await asked_for(tree), **case.get("sampling", {})}
        object.__setattr__(server.config, "ignore_eos", tree.actor_rollout_ref.rollout.ignore_eos)
        prompts = [prompt for prompt in job["prompts"] for _ in range(COPIES)]
        calls = (server.generate(prompt, dict(given), f"{name}-{i}") for i, prompt in enumerate(prompts))
        outputs = await asyncio.gather(*calls)
        pairs = list(zip(prompts, outputs, strict=True))
        temperature = tree.actor_rollout_ref.rollout.temperature
        logs = [
            trainers(policy, temperature, prompt, list(out.token_ids)) - torch.tensor(out.log_probs)
            for prompt, out in pairs
        ]
        weights = torch.cat(logs).double().exp()
        result[name] = {
            "mean": weights.mean().item(),
            "error": (weights.std() / len(weights) ** 0.5).item(),
            "tokens": len(weights),
            "longest": max(len(out.token_ids) for out in outputs),
            "asked": given,
        }
        OmegaConf.update(
            tree, ROLLOUT, {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": False}, merge=True
        )
    server.engine.shutdown()
    return result


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(asked["out"]).write_text(json.dumps(asyncio.run(measure(asked))))
