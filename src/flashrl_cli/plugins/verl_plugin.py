"""Entry point `verl.plugins`: verl imports this module in every process of a run (it loads plugins, it does not call them).

Outside a run of flashrl's, or on a GPU, it does nothing: the GPU needs no help. verl hides an exception raised here behind a debug
line, so the launcher proves in the handshake files what really runs.
"""

from __future__ import annotations

import os

from flashrl_cli import contract

if contract.plugin_dir() is not None and os.environ.get(contract.ENV_PLATFORM) == "cpu":
    from flashrl_cli.plugins import cpu_patches, cpu_platform

    cpu_patches.apply()
    cpu_platform.register()
