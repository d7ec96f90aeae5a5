"""What a vLLM engine holds and computes after each of a list of refits, sent as verl sends them. Usage: JOB.json."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.integration.engine_logprobs import logprobs

if TYPE_CHECKING:
    import torch


class StateExtension:
    """vLLM worker extension: refits from one small buffer that is overwritten after each bucket, and digests of all
    weights.
    """

    model_runner: Any
    device: Any
    arrival: Any = None

    def send(self, folder: str, bucket: int, dtype: str) -> dict[str, Any]:
        """Refit with all weights of an HF folder as `dtype`, `bucket` bytes at a time; returns the handshake."""
        from flashrl_cli.plugins.arrival import Arrival
        from flashrl_cli.plugins.refit import describe

        model = self.model_runner.model
        self.arrival = self.arrival or Arrival(model)
        seconds = self._refit(folder, bucket, dtype, arrival=self.arrival)
        handshake = describe(model, device=self.device, refits=1, refit_s=seconds)
        return {**asdict(handshake), "arrival": self.arrival.figures()}

    def send_torn(self, folder: str, bucket: int, dtype: str, left_out: str, how: str) -> str:
        """Why the same without one tensor is refused: `in place`, `layerwise`, or `by name`, held against the refit
        before.
        """
        from unittest.mock import patch

        from flashrl_cli.plugins import refit as in_place
        from flashrl_cli.plugins.coverage import COMPLETE, Incomplete

        if how != "by name":
            vars(self.model_runner.model).pop(COMPLETE, None)
        possible = in_place.writes_in_place
        with patch.object(in_place, "writes_in_place", lambda model: how != "layerwise" and possible(model)):
            try:
                self._refit(folder, bucket, dtype, left_out)
            except Incomplete as error:
                return str(error)
        return "taken"

    def _refit(self, folder: str, bucket: int, dtype: str, left_out: str = "", **more: Any) -> float:
        from flashrl_cli.plugins.refit import refit

        runner = self.model_runner
        arguments = (runner.model, runner.vllm_config.model_config, self.device)

        def stream(load: Any) -> None:
            self._stream(load, Path(folder), bucket, dtype, left_out)

        return refit(*arguments, stream, reused=True, **more)

    def _stream(self, load: Any, folder: Path, bucket: int, dtype: str, left_out: str) -> None:
        import torch
        from safetensors.torch import load_file

        kind: torch.dtype = getattr(torch, dtype)
        weights = {
            name: weight.to(self.device, kind)
            for name, weight in load_file(folder / "model.safetensors").items()
            if name != left_out
        }
        largest = max(weight.numel() for weight in weights.values())
        buffer = torch.empty(max(bucket // kind.itemsize, largest), dtype=kind, device=self.device)
        for group in packed(weights, buffer.numel()):
            offset, views = 0, []
            for name in group:
                view = buffer[offset : offset + weights[name].numel()].view(weights[name].shape)
                views.append((name, view.copy_(weights[name])))
                offset += view.numel()
            load(views)
            torch.cuda.synchronize()
            buffer.fill_(7.0)

    def digests(self) -> dict[str, str]:
        """Of the bytes of every parameter and buffer of the model."""
        import torch

        model = self.model_runner.model
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {
            name: hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
            if tensor.numel() and not tensor.is_meta
        }


def packed(weights: dict[str, torch.Tensor], room: int) -> Iterator[list[str]]:
    """Names in groups of at most `room` elements."""
    group: list[str] = []
    held = 0
    for name, weight in weights.items():
        if group and held + weight.numel() > room:
            yield group
            group, held = [], 0
        group.append(name)
        held += weight.numel()
    yield group


def generated(engine: Any, sequences: list[list[int]]) -> list[list[Any]]:
    """Greedy tokens and their log-probs, which come through CUDA graphs."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    asked = SamplingParams(temperature=0.0, max_tokens=12, logprobs=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": row[:8]} for row in sequences], asked, use_tqdm=False)
    return [
        [
            [token, step[token].logprob]
            for token, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
        ]
        for o in outputs
    ]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """State of each rank at the start and after each refit; a job may have it sleep before each, as verl does."""
    from vllm import LLM

    from flashrl_cli.precision import PRECISIONS

    sleeps = job.get("sleeps", False)
    engine = LLM(
        model=job["model"],
        quantization=PRECISIONS[job["precision"]].method,
        load_format=job["load_format"],
        worker_extension_cls="tests.gpu.engine_state.StateExtension",
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=64,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 28,
        enable_sleep_mode=sleeps,
        kv_cache_dtype=job.get("kv_cache", "auto"),
        tensor_parallel_size=job.get("tensor_parallel", 1),
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 32]},
    )
    result: dict[str, Any] = {"digests": [], "holds": []}
    if not job["refits"]:
        result["digests"].append(engine.collective_rpc("digests"))
    for folder in job["refits"]:
        if sleeps:
            engine.sleep(level=2)
            engine.wake_up(tags=["weights"])
        result["holds"] += engine.collective_rpc("send", args=(folder, job["bucket"], job["dtype"]))
        if sleeps:
            engine.wake_up(tags=["kv_cache"])
        result["digests"].append(engine.collective_rpc("digests"))
    for torn in job.get("torn", []):
        asked = (job["model"], job["bucket"], job["dtype"], *torn)
        result["torn"] = [*result.get("torn", []), *engine.collective_rpc("send_torn", args=asked)]
    if job.get("torn"):
        engine.collective_rpc("send", args=(job["refits"][-1], job["bucket"], job["dtype"]))
        result["digests"].append(engine.collective_rpc("digests"))
    rows = job["sequences"]
    return {**result, "logprobs": logprobs(engine, rows), "generated": generated(engine, rows)}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["out"]).write_text(json.dumps(run(asked)), encoding="utf-8")
