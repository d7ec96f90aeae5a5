"""Breaks every refit of the rollout engine on purpose: the weights arrive and are dropped.

verl imports it in each of its processes (VERL_USE_EXTERNAL_MODULES); only vLLM's workers have vLLM loaded by then.
"""

import sys

if "vllm" in sys.modules:
    from flashrl_cli.plugins import refit

    def drop(model, model_config, device, stream, **options):
        stream(lambda bucket: None)
        return 0.0

    refit.refit = drop
