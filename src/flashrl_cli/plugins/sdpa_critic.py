"""A critic without flash-attn: verl asks for that kernel by name, whatever the configuration says.

Loaded through verl's own hook `critic.model.external_lib`, which imports a module in the critic's workers and nowhere else.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import verl.utils.model
from transformers import AutoModelForTokenClassification

VERL_VERSION = "0.9.1"


def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    """verl's loader of the same name with the attention that `override_config` chose, or SDPA.

    verl/utils/model.py:641 passes `attn_implementation="flash_attention_2"`, and reports its absence as a missing `trl`.
    """
    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        torch_dtype=torch_dtype,
        config=model_config,
        attn_implementation=getattr(model_config, "_attn_implementation", None) or "sdpa",
        trust_remote_code=trust_remote_code,
    )


if version("verl") != VERL_VERSION:
    raise RuntimeError(f"flashrl_cli.plugins.sdpa_critic is written for verl {VERL_VERSION}")
verl.utils.model.load_valuehead_model = load_valuehead_model
