"""Raw rows from the Hugging Face hub, through `datasets.load_dataset` only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrl_cli.data.extras import require
from flashrl_cli.data.readers import BATCH
from flashrl_cli.data.rows import Located, Place
from flashrl_cli.data.stamps import stamp
from flashrl_cli.doctor.network import resolves
from flashrl_cli.errors import EnvironmentNotReady, InputError

if TYPE_CHECKING:
    from flashrl_cli.data.rows import BadRows

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
NO_PROGRESS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
LOCAL = "--source PATH takes a file or folder that was fetched elsewhere"


@dataclass(slots=True)
class HubSource:
    """A data set on the hub, or in the hub's cache on this machine."""

    label: str
    config: str | None
    splits: tuple[str, ...]
    loaded: Any = field(default=None, repr=False)

    def rows(self, split: str, bad: BadRows) -> Iterator[Located]:  # noqa: ARG002
        """Yield the rows of a split."""
        number = 0
        for table in self._split(split).with_format("arrow").iter(BATCH):
            for row in table.to_pylist():
                number += 1
                yield Place(f"{self.label}:{split}", number, "row"), row

    def count(self, split: str) -> int:
        """Rows of a split, downloading it first."""
        return len(self._split(split))

    def describe(self) -> dict[str, Any]:
        """Id, config, and the files in the hub's cache, whose folder is named after the commit."""
        used = {split: self._split(split).cache_files for split in self.splits}
        stamps = {split: [stamp(Path(file["filename"])) for file in cached] for split, cached in used.items()}
        return {"kind": "hub", "id": self.label, "config": self.config, "files": stamps}

    def matches(self, was: dict[str, Any]) -> bool:
        """Whether it is the same id; a newer commit is fetched only when asked for (`--force`)."""
        return (was.get("kind"), was.get("id"), was.get("config")) == ("hub", self.label, self.config)

    def _split(self, split: str) -> Any:
        """The split, or, for a set of one split, the only one that the hub has."""
        self._load()
        if split in self.loaded:
            return self.loaded[split]
        if len(self.splits) == 1 and len(self.loaded) == 1:
            return next(iter(self.loaded.values()))
        raise InputError(f"{self.label} has no split {split!r}", hint=f"it has {', '.join(self.loaded)}; {LOCAL}")

    def _load(self) -> None:
        if self.loaded is not None:
            return
        detect_offline()
        datasets = require("datasets")
        try:
            self.loaded = datasets.load_dataset(self.label, self.config)
        except ValueError as error:
            raise InputError(
                f"{self.label}: {error}", hint="--source owner/name:config names a configuration"
            ) from error
        except (OSError, datasets.exceptions.DatasetsError) as error:
            why = "this machine is offline, and the hub's cache does not hold it" if is_offline() else str(error)
            raise EnvironmentNotReady(f"cannot fetch {self.label} from the hub: {why}", hint=LOCAL) from error


def go_offline() -> None:
    """Keep the hub's libraries, which must not have been imported yet, from the network."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def is_offline() -> bool:
    """Whether the hub's libraries keep from the network."""
    return os.environ.get(OFFLINE[0], "").lower() in {"1", "on", "yes", "true"}


def detect_offline() -> None:
    """Go offline if the hub cannot be named, here or by a proxy: its libraries would try for half a minute."""
    if not is_offline() and not resolves(os.environ):
        go_offline()


def hide_progress() -> None:
    """Keep the hub's libraries, which must not have been imported yet, from drawing bars."""
    os.environ.update(dict.fromkeys(NO_PROGRESS, "1"))
