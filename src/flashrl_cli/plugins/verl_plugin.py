"""Entry point `verl.plugins`: verl imports this module in every process of a run.

verl loads plugins without calling them, so the module acts when it is imported. Outside of a flashrl run it does
nothing. It makes the trainer compute log-probs in chunks, handle batches without loops over their rows, give its models
the attention of the configuration, report more of its correction, keep a sample of its log-ratios and score further
data sources, and on a GPU send weights in bf16, where that loses nothing. verl logs an exception raised here at DEBUG
level only, so the launcher uses the handshake files to verify what really runs.
"""

from __future__ import annotations

import atexit
import gc
import os

from flashrl_cli import contract

if contract.plugin_dir() is not None:
    if os.environ.get(contract.ENV_PLATFORM) == "cpu":
        from flashrl_cli.plugins import cpu

        cpu.apply()
        cpu.register()
    from flashrl_cli.plugins import attention

    attention.apply()
    if contract.RolloutOptions.here().bf16_transfer:
        from flashrl_cli.plugins import transfer

        transfer.send_bf16()
    from flashrl_cli.plugins import batches, corrections, log_probs, log_ratios, scorers, separate

    batches.apply()
    log_probs.apply()
    corrections.apply()
    log_ratios.apply()
    scorers.apply()
    separate.apply()
    if os.environ.get(contract.ENV_SERVER):
        from flashrl_cli.plugins import forked

        forked.start_ray_workers_by_fork()
    # at its end Python would search all modules' objects for cycles again: 1.5 s of a core in each process of a run
    atexit.register(gc.freeze)
    contract.logger().info("loaded by verl for %s", contract.RolloutOptions.here())
