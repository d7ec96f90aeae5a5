"""verl's own Hydra tree, composed with our overrides, without importing verl or torch.

Hydra stops at the first wrong key. A list of overrides that composes is accepted at once; one that does not is compared
key by key with the tree, so that everything wrong with it is reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import EnvironmentNotReady, Location, Problem

if TYPE_CHECKING:
    from flashrl_cli.verl.overrides import Override

CONFIG_NAME = "ppo_trainer"


def config_folder() -> Path:
    """Folder of verl's configuration files. Raises EnvironmentNotReady when verl is not installed."""
    found = find_spec("verl")
    if found is None or found.origin is None:
        raise EnvironmentNotReady(
            "verl is not installed", hint="install a stack: requirements/cpu.txt or requirements/gpu.txt"
        )
    return Path(found.origin).parent / "trainer" / "config"


class Tree:
    """verl's configuration with overrides applied."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def get(self, key: str) -> Any:
        """Value at a dotted key with its interpolations resolved; None where the tree has none.

        Maps and lists are returned as plain data.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import ConfigTypeError

        try:
            value = OmegaConf.select(self._config, key, throw_on_missing=False)
        except ConfigTypeError:  # a name within a list
            return None
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def put(self, override: Override) -> None:
        """Apply one more override, of a key and a type that a composition accepts; it is not checked."""
        from omegaconf import OmegaConf

        value = list(override.value) if isinstance(override.value, tuple) else override.value
        OmegaConf.update(self._config, override.key, value, merge=False, force_add=True)

    def container(self) -> dict[str, Any]:
        """The tree as plain data, with interpolations left unresolved."""
        from omegaconf import OmegaConf

        plain: dict[str, Any] = OmegaConf.to_container(self._config, resolve=False)
        return plain


def tree(overrides: Sequence[str]) -> Tree:
    """verl's configuration with `overrides` applied strictly.

    Raises HydraException for an override that Hydra refuses, and EnvironmentNotReady when verl is not installed.
    """
    import hydra

    with hydra.initialize_config_dir(str(config_folder()), version_base=None):
        return Tree(hydra.compose(CONFIG_NAME, overrides=list(overrides)))


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """verl's configuration with `overrides` applied, as plain data; see `tree`."""
    return tree(overrides).container()


def attempt(overrides: Sequence[Override]) -> tuple[Tree | None, list[Problem]]:
    """The tree composed of the overrides whose keys are right, and the problems with the others.

    The tree is None where Hydra refuses the remaining overrides, too. Raises EnvironmentNotReady when verl is not
    installed.
    """
    from hydra.errors import HydraException

    try:
        return tree([str(override) for override in overrides]), []
    except HydraException as error:
        wrong, found = _explain(overrides)
        if not found:
            return None, [_refusal(error, None)]
    with contextlib.suppress(HydraException):
        return tree([str(override) for override in overrides if override not in wrong]), found
    return None, found


def _explain(overrides: Sequence[Override]) -> tuple[list[Override], list[Problem]]:
    """Overrides with a wrong key, and the problem with each.

    Overrides that choose a part of the tree (`model_engine=megatron`) are applied before keys are looked up.
    """
    from hydra.errors import HydraException

    groups = [override for override in overrides if _is_group(override.key)]
    try:
        keys = frozenset(_keys(compose([str(group) for group in groups])))
    except HydraException as error:
        return groups, [_refusal(error, groups[0].origin.where)]
    wrong = [(override, problem) for override in overrides if (problem := _problem(override, keys))]
    return [override for override, _ in wrong], [problem for _, problem in wrong]


def _refusal(error: Exception, where: Location | None) -> Problem:
    return Problem(f"verl's configuration refuses the overrides: {str(error).splitlines()[0]}", where)


def _is_group(key: str) -> bool:
    return (config_folder() / key).is_dir()


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def _problem(override: Override, keys: frozenset[str]) -> Problem | None:
    exists = override.key in keys or _is_group(override.key)
    if exists and override.added:
        return Problem(f"verl has a key {override.key}", override.origin.where, "write it without the +")
    if exists or override.added:
        return None
    return Problem(f"verl has no key {override.key}", override.origin.where, _nearest(override.key, keys))


def _nearest(key: str, keys: frozenset[str]) -> str:
    near = get_close_matches(key, sorted(keys), n=2, cutoff=0.8)
    same_name = sorted(k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2])
    found = near or same_name[:2] or get_close_matches(key, sorted(keys), n=1)
    if not found:
        return f"+{key} adds a key that verl's tree lacks"
    return f"did you mean {' or '.join(found)}? (+{key} would add a new key)"
