"""Entry point `vllm.general_plugins`: vLLM calls `register` in every process that it starts.

It registers flashrl's quantization methods, checks that loading a model's folder writes every parameter, lets the
engine and verl's server exchange fewer messages, keeps what weight updates return, and registers the float32 head if a
run asks for it. Outside of a flashrl run it does nothing.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

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


def sleep_beside_others() -> None:
    """Let an engine go to sleep while other processes allocate memory on its GPU (idempotent).

    vLLM asserts that the free memory of the whole GPU does not shrink meanwhile (vllm/v1/worker/gpu_worker.py:180 in
    0.24, :231 in 0.28), so that another run which wakes its engine ends this one
    (https://github.com/vllm-project/vllm/pull/45620). Only a line for the log follows the assertion. Raises
    RuntimeError for a version of vLLM that is not supported.
    """
    import vllm
    from vllm.v1.worker.gpu_worker import Worker

    contract.require_vllm(vllm.__version__)
    original = Worker.sleep
    if getattr(original, contract.PATCHED, False):
        return

    @functools.wraps(original)
    def sleep(self: Any, level: int = 1) -> None:
        try:
            original(self, level)
        except AssertionError as error:
            if "after sleeping" not in str(error):
                raise
            contract.logger().info("other processes took memory of this GPU while the engine went to sleep")

    setattr(sleep, contract.PATCHED, True)
    Worker.sleep = sleep
