"""What verl's trainer spends on a batch's rows beside the model: verl's own functions and flashrl's in their place.

    python -m benchmarks.batches [--out benchmarks/results/batches.json] [--rows 1024]

CPU seconds of one thread, the least of several rounds that take turns, so that other work on the machine disturbs them
little. The responses have 50 to 300 tokens, the prompts 60 to 200. `objects` is what one field that is no tensor costs
a worker when it fetches a batch and copies its micro-batches to the device; flashrl's workers do not fetch it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch  # noqa: TID253  (nothing here works without it)

from flashrl_cli import files

ROUNDS = 5
PASSES = 12
Way = Callable[[], object]


def ways_of(rows: int) -> dict[str, dict[str, Way]]:
    """What is measured: both ways of each task."""
    import verl.utils.seqlen_balancing as balancing
    from tensordict import TensorDict
    from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager as Manager
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils import padding

    from flashrl_cli.plugins import batches

    names = ("no_padding_2_padding", "response_from_nested", "response_to_nested")
    stock = SimpleNamespace(
        balance=balancing.get_seqlen_balanced_partitions,
        select=tu.index_select_tensor_dict,
        **{name: vars(padding)[name] for name in names},
    )
    batches.apply()
    draw = random.Random(0)
    prompts = [draw.randint(60, 200) for _ in range(rows)]
    responses = [draw.randint(50, 300) for _ in range(rows)]
    lengths = [a + b for a, b in zip(prompts, responses, strict=True)]

    def jagged(sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.ones(size, dtype=dtype) for size in sizes], layout=torch.jagged)

    ids, outputs = jagged(lengths, torch.int64), jagged(lengths, torch.float32)
    mask = jagged(responses, torch.int64)
    padded = torch.ones(rows, max(responses))
    batch = TensorDict({"prompts": jagged(prompts, torch.int64), "responses": mask}, batch_size=[rows])
    workloads = balancing.calculate_workload(torch.tensor(lengths))
    parts = [list(range(place, rows, PASSES)) for place in range(PASSES)]
    objects = [{"index": index, "split": "train"} for index in range(rows)]

    def loss(function: Callable[[torch.Tensor, Any], torch.Tensor]) -> Way:
        leaf = torch.ones(sum(lengths), requires_grad=True)
        return lambda: function(leaf, batch).sum().backward()

    def passes(select: Callable[[Any, Any], Any], field: Any) -> Way:
        data = TensorDict({"field": field}, batch_size=[rows])
        return lambda: [select(data, torch.tensor(part)).to("cpu") for part in parts]

    def fetched() -> None:
        passes(tu.index_select_tensor_dict, Manager._pack_field_values(objects))()

    def both(name: str, *given: Any) -> dict[str, Way]:
        return {"verl": lambda: vars(stock)[name](*given), "flashrl": lambda: vars(padding)[name](*given)}

    return {
        "balancing for one rank": {
            "verl": lambda: stock.balance(workloads, 1, True),
            "flashrl": lambda: balancing.get_seqlen_balanced_partitions(workloads, 1, True),
        },
        "objects": {"verl": fetched, "flashrl": lambda: None},
        "micro-batches of a jagged field": {
            "verl": passes(stock.select, ids),
            "flashrl": passes(tu.index_select_tensor_dict, ids),
        },
        "log-probs of responses for the loss, and gradient": {
            "verl": loss(stock.no_padding_2_padding),
            "flashrl": loss(padding.no_padding_2_padding),
        },
        "responses of a model's outputs": both("response_from_nested", outputs, mask),
        "responses without padding": both("response_to_nested", padded, mask),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/batches.json"))
    parser.add_argument("--rows", type=int, default=1024)
    given = parser.parse_args()
    torch.set_num_threads(1)
    spent: dict[str, dict[str, float]] = {}
    tasks = ways_of(given.rows)
    for _ in range(ROUNDS):
        for task, ways in tasks.items():
            for name, way in ways.items():
                began = time.process_time()
                way()
                seconds = time.process_time() - began
                least = spent.setdefault(task, {})
                least[name] = round(min(seconds, least.get(name, seconds)), 5)
    result = {
        "command": f"python -m benchmarks.batches --rows {given.rows}",
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "verl", "tensordict", "TransferQueue")},
        "rows": given.rows,
        "cpu_s": spent,
    }
    files.write_json(given.out, result)
    print(json.dumps(spent, indent=2))


if __name__ == "__main__":
    main()
