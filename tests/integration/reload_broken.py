"""The reload test's measurements of one engine: sound, with one layer that keeps its first weights, and with all
keeping them.

Usage: PRECISION FOLDER; writes FOLDER/measured.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashrl_cli.doctor import reload_engine
from flashrl_cli.plugins import disk_refit
from flashrl_cli.plugins.refit import refit

KEPT = {"sound": None, "one layer": "layers.1.mlp.down_proj", "all": ""}


def keeping(part: str) -> Callable[..., float]:
    """A refit to which tensors with `part` in their name come as they were the first time."""
    first: dict[str, Any] = {}

    def broken(model: Any, model_config: Any, device: Any, stream: Any, **options: Any) -> float:
        def old(name: str, tensor: Any) -> Any:
            return first.setdefault(name, tensor.clone()) if part in name else tensor

        def some(load: Any) -> None:
            stream(lambda bucket: load([(name, old(name, tensor)) for name, tensor in bucket]))

        return refit(model, model_config, device, some, **options)

    return broken


if __name__ == "__main__":
    precision, folder = sys.argv[1], Path(sys.argv[2])
    models = {name: reload_engine.policy(folder / name, seed) for seed, name in enumerate("AB")}
    llm = reload_engine.start(folder / "A", precision)
    found = {}
    for name, part in KEPT.items():
        vars(disk_refit)["refit"] = refit if part is None else keeping(part)
        found[name] = {"start_s": 0.0, **reload_engine.measure(llm, folder, models)}
    (folder / "measured.json").write_text(json.dumps(found))
