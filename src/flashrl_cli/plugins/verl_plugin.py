"""Entry point `verl.plugins`: verl imports this module in every process of a run (it loads plugins, it does not call them).

Outside a run of flashrl's it does nothing; on a GPU it only has weights sent in bf16, where that loses nothing. verl
hides an exception raised here behind a debug line, so the launcher proves in the handshake files what really runs.
"""

from __future__ import annotations

import os

from flashrl_cli import contract

if contract.plugin_dir() is not None:
    if os.environ.get(contract.ENV_PLATFORM) == "cpu":
        from flashrl_cli.plugins import cpu

        cpu.apply()
        cpu.register()
    if contract.RolloutOptions.here().bf16_transfer:
        from flashrl_cli.plugins import transfer

        transfer.send_bf16()
    contract.logger().info("loaded by verl for %s", contract.RolloutOptions.here())
