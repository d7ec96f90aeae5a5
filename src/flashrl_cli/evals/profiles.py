"""Whether a smoothing profile can be applied to what is evaluated, found out before an engine starts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flashrl_cli.errors import InputError
from flashrl_cli.weights import Unreadable, read_json
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from flashrl_cli.evals.job import EngineSettings

_WITHOUT = "evaluate it without --profile"


def check(engine: EngineSettings, folders: Iterable[Path]) -> None:
    """Raise InputError unless the engine's profile, if any, is applied to the models in `folders`."""
    if engine.profile is None:
        return
    if engine.rollout == "bf16":
        raise InputError(
            "--profile smooths what a quantized rollout loses, and bf16 loses nothing", hint="--rollout int8"
        )
    try:
        profile = Profile.read(Path(engine.profile))
    except Unreadable as error:
        raise InputError(str(error), hint="`flashrl quantize MODEL --calibrate PARQUET` makes one") from None
    for folder in folders:
        try:
            config = read_json(folder / "config.json")
        except Unreadable:
            continue  # it is passed over later, with the reason
        if "quantization_config" in config:
            raise InputError(f"{folder} is quantized already and takes no profile", hint=_WITHOUT)
        if unlike := profile.suits(config):
            raise InputError(f"{engine.profile} is of another model than {folder}: {unlike}", hint=_WITHOUT)
