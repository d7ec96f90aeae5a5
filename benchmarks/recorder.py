"""Writes the token ids of every step's samples to the folder $FLASHRL_SAMPLES, in verl's trainer, for benchmarks.step.

verl imports it into its processes by VERL_USE_EXTERNAL_MODULES=benchmarks.recorder. When the trainer drops a step's
rows from its TransferQueue (verl/trainer/ppo/v1/trainer_base.py:511 in 0.9.1), which no timer of a step includes, their
prompts and responses are read once more and written to `<number of the step>.jsonl`.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

ENV = "FLASHRL_SAMPLES"


def record(folder: Path) -> None:
    """Replace TransferQueue's `kv_clear` by one that writes the training rows first (idempotent)."""
    import transfer_queue

    original = transfer_queue.kv_clear
    if getattr(original, "records", False):
        return
    steps = itertools.count(1)

    def kv_clear(*, keys: Any, partition_id: str, **more: Any) -> Any:
        # keys of prompts, which are cleared at other times, have no underscore
        if partition_id == "train" and all("_" in key for key in keys):
            fields = ["prompts", "responses"]
            data = transfer_queue.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)
            rows = [data[name].unbind() for name in fields]
            # `<prompt>_<response>_<output>` (verl/trainer/ppo/v1/agent_loop_tq.py:177): those of a prompt are together
            order = sorted(range(len(keys)), key=lambda index: keys[index])
            lines = [
                json.dumps({"prompt": rows[0][index].tolist(), "response": rows[1][index].tolist()}) for index in order
            ]
            (folder / f"{next(steps)}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return original(keys=keys, partition_id=partition_id, **more)

    kv_clear.records = True  # type: ignore[attr-defined]
    transfer_queue.kv_clear = kv_clear


if os.environ.get(ENV):
    record(Path(os.environ[ENV]))
