"""flashrl's entry points in verl and vLLM: announced, not switched off, and loadable.

Both programs swallow a failure to load one (verl/__init__.py at DEBUG level, vllm/plugins/__init__.py with a log line), so that a
broken plugin would be found only when a rollout worker fails to prove its precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from flashrl_cli.doctor.finding import Finding, fail, ok

PLUGIN = "flashrl"
ENTRY_POINTS = {"verl.plugins": "VERL_USE_EXTERNAL_PLUGINS", "vllm.general_plugins": "VLLM_PLUGINS"}
"""Groups in which flashrl has an entry point, and the variable that can switch it off."""


def findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield how each entry point stands in this environment."""
    for group, switch in ENTRY_POINTS.items():
        broken = list(_broken(group, metadata.entry_points(group=group)))
        broken += switched_off(group, switch, environment.get(switch))
        yield from broken or [ok(group, "flashrl's plugin loads")]


def switched_off(group: str, switch: str, allowed: str | None) -> Iterator[Finding]:
    """Yield a failure where the list of allowed plugins leaves flashrl's out."""
    if allowed not in (None, "auto") and PLUGIN not in allowed.split(","):
        yield fail(group, f"{switch}={allowed} keeps flashrl's plugin out", f"add {PLUGIN} to it or unset it")


def _broken(group: str, points: Iterable[metadata.EntryPoint]) -> Iterator[Finding]:
    own = [point for point in points if point.name == PLUGIN]
    if not own:
        fix = "`pip install --no-deps -e .` in a checkout of flashrl"
        yield fail(group, f"flashrl's entry point in {group} is missing", fix)
    for point in own:
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - whatever a plugin raises keeps it out
            yield fail(
                group,
                f"{point.value} does not load: {error!r}",
                "`pip install --no-deps -e .` in a checkout of flashrl",
            )
