"""Is the smoothing profile of a run one, and of the run's model?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashrl_cli.doctor.finding import Finding, fail, ok, warn
from flashrl_cli.launch.inputs import PROFILE
from flashrl_cli.text import counted
from flashrl_cli.weights import Unreadable, Weights, read_json
from flashrl_cli.weights.contents import shapes
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    from pathlib import Path

_MAKE = "`flashrl quantize MODEL --calibrate PARQUET` makes one, --set rollout.profile=null goes without"


def judge(path: Path, model: Path | None) -> Finding:
    """How the profile in `path` stands to the HF folder that training begins with (None for one on the hub, which is not looked at).

    Smoothing preserves what any weights of that shape compute, so that a profile of other weights helps less and harms nothing.
    """
    if not path.is_file():
        return fail(PROFILE, f"{path} does not exist", _MAKE)
    try:
        profile = Profile.read(path)
    except Unreadable as error:
        return fail(PROFILE, str(error), _MAKE)
    told = f"{path}, of {profile.about.model}: {counted(len(profile.names), 'tensor')}"
    if model is None or not model.is_dir():
        return ok(PROFILE, told)
    try:
        unlike = profile.suits(read_json(model / "config.json")) or profile.fits(shapes(model))
        same = Weights(hf=model).fingerprint() == profile.about.fingerprint
    except Unreadable:
        return ok(PROFILE, told)  # not in safetensors: shapes are held against the profile at each refit
    if unlike:
        return fail(PROFILE, f"{path} is of another model: {unlike}", _MAKE)
    return (
        ok(PROFILE, told)
        if same
        else warn(PROFILE, f"{told}, calibrated on other weights than those in {model}", _MAKE)
    )
