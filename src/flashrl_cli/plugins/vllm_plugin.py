"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process that it starts.

It registers flashrl's quantization methods, checks that loading a model's folder writes every parameter, lets the
engine and verl's server exchange fewer messages, keeps what weight updates return, and registers the float32 head if a
run asks for it. Outside of a flashrl run it does nothing.
"""

from __future__ import annotations

import os
import sys

from flashrl_cli import contract


def register() -> None:
    """Register flashrl's quantization methods and the options of the run's RolloutOptions with vLLM (idempotent)."""
    if contract.plugin_dir() is None:
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from flashrl_cli.plugins import arrival, coverage, linear, outputs

    for config in linear.CONFIGS:
        register_quantization_config(config.get_name())(config)
    coverage.check_first_load()
    outputs.apply()
    if os.environ.get(contract.ENV_PLATFORM) == "cpu":
        outputs.sleep_between_messages()
    if outputs.SERVER in sys.modules:
        arrival.keep_answers()
    if contract.RolloutOptions.here().lm_head_fp32:
        linear.register_float32_head()
    if os.environ.get(contract.ENV_SERVER):
        from flashrl_cli.plugins import forked_engine

        forked_engine.start_engines_by_fork()
    contract.logger().info("registered with vLLM for %s", contract.RolloutOptions.here())
