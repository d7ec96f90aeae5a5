"""Specs of presets for tests, with the options that they would get on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence

from flashrl_cli import paths
from flashrl_cli.config.resolve import Options, Resolved, read_spec
from flashrl_cli.train.launch import preview


def load_spec(preset: str, *, rollout: str | None = None, tis: str | None = None, sets: Sequence[str] = ()) -> Resolved:
    """A preset under options. Raises InputError with everything that is wrong with it."""
    return read_spec(preset, Options(rollout=rollout, tis=tis, sets=sets)).checked()


TINY = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 259,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""Sizes of the prepared tiny policy (data/tiny.py)."""


def decided_spec(
    preset: str, *, rollout: str | None = None, tis: str | None = None, sets: Sequence[str] = ()
) -> Resolved:
    """The same with a value for each `auto`, on GPUs of 80 GB and with the tiny policy prepared in an empty folder."""
    folder = paths.data_root() / "tiny" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return preview(preset, Options(rollout=rollout, tis=tis, sets=sets), lambda _: [])[0]
