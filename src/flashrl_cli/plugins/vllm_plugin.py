"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process that it starts.

It registers the quantization method `flashrl_int8`, and nothing in runs that are not flashrl's.
"""

from __future__ import annotations

from flashrl_cli import contract


def register() -> None:
    """Register `flashrl_int8` with vLLM (idempotent)."""
    if contract.plugin_dir() is None:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from flashrl_cli.plugins.int8_linear import Int8OnlineConfig

    register_quantization_config(contract.INT8_METHOD)(Int8OnlineConfig)
