"""The rows of several data files as one data set of verl's, with shares.

verl concatenates the files' tables (verl/utils/dataset/rl_dataset.py:196 in 0.9.1), which fails where a key of
`extra_info` has another type in each, and its only shares are the numbers of rows. Here each file stays a table of its
own, and a row of the data set is a row of one of them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from verl.utils.dataset.rl_dataset import RLHFDataset

from flashrl_cli.contract import SHARES, VERL


def counts(lengths: Sequence[int], shares: Sequence[float] | None) -> list[int]:
    """Number of rows that each file contributes to an epoch: its own, or as many as `shares` ask for.

    With shares the file that has most rows for its share contributes each of them once, and the others repeat some, so
    that no row is left out.
    """
    if shares is None:
        return list(lengths)
    most = max(length / share for length, share in zip(lengths, shares, strict=True) if length)
    return [round(most * share) if length else 0 for length, share in zip(lengths, shares, strict=True)]


def places(lengths: Sequence[int], shares: Sequence[float] | None) -> Iterator[tuple[int, int]]:
    """Yield file and row of each row of an epoch; rows that a file repeats are spread evenly over it."""
    for file, (length, count) in enumerate(zip(lengths, counts(lengths, shares), strict=True)):
        yield from ((file, index * length // count) for index in range(count))


class Mixture:
    """Rows of several tables by one index, each with the columns of all tables; None for those that its own lacks."""

    def __init__(self, parts: Sequence[Any], order: np.ndarray) -> None:
        """`order` is int64 [rows, 2]: table and row of each row."""
        self.parts = parts
        self.order = order
        self.columns = list(dict.fromkeys(name for part in parts for name in part.column_names))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self.order[index]
        found = self.parts[part][int(row)]
        return {name: found.get(name) for name in self.columns}


class MixedDataset(RLHFDataset):
    """verl's data set, of files that need not have the same columns; training files with shares.

    Raises RuntimeError for a verl other than 0.9.1.
    """

    dataframe: Mixture

    def __init__(self, *args: Any, **settings: Any) -> None:
        if importlib.metadata.version("verl") != VERL:
            raise RuntimeError(f"flashrl mixes data sets of verl {VERL} only")
        super().__init__(*args, **settings)

    def _read_files_and_tokenize(self) -> None:
        parts = [self.maybe_filter_out_long_prompts(_table(file)) for file in self.data_files]
        lengths = [len(part) for part in parts]
        order = np.array(list(places(lengths, self._shares())), dtype=np.int64).reshape(-1, 2)
        if 0 < self.max_samples < len(order):
            order = order[self._sampled(len(order))]
        self.dataframe = Mixture(parts, order)
        for number, (file, length) in enumerate(zip(self.data_files, lengths, strict=True)):
            print(f"data set: {(order[:, 0] == number).sum()} rows an epoch of the {length} in {file}")

    def _shares(self) -> list[float] | None:
        training = list(self.original_data_files) == list(self.config.get("train_files"))
        shares = self.config.get(SHARES) if training else None
        return None if shares is None else list(shares)

    def _sampled(self, total: int) -> np.ndarray:
        """Rows of a data set that is limited, chosen as verl does."""
        if not self.shuffle:
            return np.arange(self.max_samples)
        rng = np.random.default_rng(self.seed)
        return np.asarray(rng.choice(total, size=self.max_samples, replace=False))


def _table(file: str) -> Any:
    kind = "parquet" if file.endswith(".parquet") else "json"
    return datasets.load_dataset(kind, data_files=file)["train"]
