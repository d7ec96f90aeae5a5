"""The override list of every shipped preset, at every precision, without and with its cap, word for word.

`make golden` writes the lists anew and deletes those that no preset stands for any more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from flashrl_cli import paths
from flashrl_cli.config.resolve import Options
from flashrl_cli.config.spec import Advantage, By, CorrectionKind, Estimator, Loss
from flashrl_cli.errors import InputError
from flashrl_cli.train.launch import judge, preview
from flashrl_cli.verl.overrides import Override, Places, overrides
from tests.specs import decided_spec

FOLDER = Path(__file__).parent / "overrides"
ROOT = paths.presets_root()
PARTS = {"base"}
PRESETS = {
    path.relative_to(ROOT).with_suffix("").as_posix(): path
    for path in sorted(ROOT.rglob("*.yaml"))
    if path.relative_to(ROOT).parts[0] not in PARTS
}
PRECISIONS = ("bf16", "fp8", "fp8-block", "int8")
REFUSED = {
    *(("dapo-qwen3-30b-a3b", precision) for precision in ("int8", "fp8")),
    *((preset, p) for preset in ("gsm8k-lora-7b", "gsm8k-lora-qwen3-8b") for p in ("int8", "fp8", "fp8-block")),
}
"""Preset and precision that verl or vLLM cannot run together: check_overrides refuses them, and no list exists."""
CORRECTED = {"gsm8k-async-0.5b", "dapo-7b-async"}
"""Presets of an asynchronous mode, which flashrl refuses without a correction."""
PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/checkpoints/run"))


def cap(preset: str) -> str:
    """FlashRL's caps: 8 for DAPO, 2 for everything smaller."""
    return "8" if preset.startswith("dapo-") else "2"


CASES = {
    f"{preset}.{precision}{suffix}.txt": (preset, precision, tis)
    for preset in PRESETS
    for precision in PRECISIONS
    for suffix, tis in (("", "off"), (f".tis{cap(preset)}", cap(preset)))
    if (preset, precision) not in REFUSED and (tis != "off" or preset not in CORRECTED)
}


def listed(preset: str, precision: str, tis: str) -> tuple[Override, ...]:
    return overrides(decided_spec(str(PRESETS[preset]), rollout=precision, tis=tis), PLACES)


@pytest.mark.parametrize("name", CASES)
def test_overrides(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"overrides/{name}", "".join(f"{override}\n" for override in listed(*CASES[name])))


WAYS = {
    **{f"correction.{kind}": (f"correction.kind={kind}",) for kind in get_args(CorrectionKind)},
    **{
        f"reject.{by}.{estimator}": (
            f"correction.reject.by={by}",
            f"correction.reject.estimator={estimator}",
            "correction.reject.upper=4",
        )
        for by in get_args(By)
        for estimator in get_args(Estimator)
        if (by, estimator) != ("seq-max", "k1")
    },
    **{f"loss.{loss}": (f"algorithm.loss={loss}",) for loss in get_args(Loss)},
    **{f"advantage.{advantage}": (f"algorithm.advantage={advantage}",) for advantage in get_args(Advantage)},
}
"""Kinds of weights, rejections, losses and advantages, each with its options."""


def test_what_each_correction_loss_and_advantage_becomes(golden: Callable[[str, str], None]) -> None:
    """The overrides that the tiny preset without a correction lacks; those that it has and they lack with a minus."""

    def of(*sets: str) -> dict[str, None]:
        return dict.fromkeys(map(str, overrides(decided_spec("tiny", tis="off", sets=sets), PLACES)))

    plain, lines = of(), []
    for name, sets in WAYS.items():
        found = of(*sets)
        lines += [
            f"# {name}",
            *(f"-{one}" for one in plain if one not in found),
            *(o for o in found if o not in plain),
            "",
        ]
    golden("corrections.txt", "\n".join(lines))


def test_all_lists_are_there_and_no_others(request: pytest.FixtureRequest) -> None:
    found = {file.relative_to(FOLDER).as_posix(): file for file in FOLDER.rglob("*") if file.is_file()}
    if request.config.getoption("--renew-golden"):
        for stale in found.keys() - CASES.keys():
            found.pop(stale).unlink()
    assert len(PRESETS) == 22
    assert len(CASES) == 22 * 4 * 2 - 2 * len(REFUSED) - 4 * len(CORRECTED)
    assert found.keys() == CASES.keys()


def refusal(preset: str, precision: str) -> InputError | None:
    try:
        # without a prepared tiny policy, whose layers are smaller than blocks of FP8
        judge(*preview(str(PRESETS[preset]), Options(rollout=precision, tis=cap(preset)), lambda _: []))
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_verl_takes_every_list_but_the_refused(preset: str, precision: str) -> None:
    """All keys exist in verl's own tree, none is dead, and what cannot run is refused before it starts."""
    error = refusal(preset, precision)
    assert (error is not None) == ((preset, precision) in REFUSED), error and error.problems
