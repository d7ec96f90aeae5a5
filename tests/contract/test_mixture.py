"""Several data files as one data set of verl's: its rows, its shares, and what verl's data loader makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashrl_cli import contract
from flashrl_cli.plugins.mixture import MixedDataset, counts, places

pytestmark = pytest.mark.filterwarnings("ignore")
FILES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4)


class Words:
    """A tokenizer with a token for each word."""

    def apply_chat_template(self, chat: Any, **_: Any) -> list[int]:
        return [0] * len(chat[-1]["content"].split())


def write(path: Path, count: int, extra: Any, **columns: Any) -> str:
    """A file of `count` rows, the n-th of which asks n words; `extra(n)` is its extra_info."""
    rows = [
        {
            "data_source": path.stem,
            "prompt": [{"role": "user", "content": " ".join([path.stem] * n)}],
            "reward_model": {"style": "rule", "ground_truth": str(n)},
            "extra_info": extra(n),
            **columns,
        }
        for n in range(1, count + 1)
    ]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Files of 8 and 2 rows, in which a key of extra_info has another type, and one has a column more."""
    numbers = write(tmp_path / "numbers.parquet", 8, lambda n: {"index": n})
    texts = write(tmp_path / "texts.parquet", 2, lambda n: {"index": f"u{n}", "rubric": {"points": n}}, ability="text")
    return [numbers, texts]


def dataset(files: list[str], train: list[str] | None = None, **options: Any) -> MixedDataset:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import get_dataset_class

    custom = {"path": contract.MIXTURE[0], "name": contract.MIXTURE[1]}
    given = {"custom_cls": custom, "train_files": train or files, "filter_overlong_prompts": False, **options}
    config = OmegaConf.create(given)
    made = get_dataset_class(config)(
        data_files=OmegaConf.create(files), tokenizer=Words(), config=config, max_samples=options.get("limit", -1)
    )
    assert isinstance(made, MixedDataset)
    return made


def sources(made: MixedDataset) -> Counter[str]:
    return Counter(made[index]["data_source"] for index in range(len(made)))


@given(FILES)
def test_each_file_has_its_share_and_no_row_is_left_out(files: list[tuple[int, float]]) -> None:
    lengths, shares = [length for length, _ in files], [share for _, share in files]
    found = counts(lengths, shares)
    total = sum(shares) * max(length / share for length, share in files)
    for length, share, count in zip(lengths, shares, found, strict=True):
        assert count >= length
        assert abs(count - total * share / sum(shares)) <= 0.5
    assert any(count == length for length, count in zip(lengths, found, strict=True)), "no longer than need be"
    seen = Counter(places(lengths, shares))
    assert len(seen) == sum(lengths)
    for number, (length, count) in enumerate(zip(lengths, found, strict=True)):
        times = {seen[number, row] for row in range(length)}
        assert times <= {count // length, -(-count // length)}, "rows repeat equally often"


def test_rows_of_all_files_without_shares(files: list[str]) -> None:
    made = dataset(files)
    assert sources(made) == {"numbers": 8, "texts": 2}
    first, last = made[0], made[9]
    assert first["extra_info"] == {"index": 1}
    assert last["extra_info"] == {"index": "u2", "rubric": {"points": 2}}
    assert (first["ability"], last["ability"]) == (None, "text")
    assert last["raw_prompt"] == [{"role": "user", "content": "texts texts"}]


def test_shares_are_those_of_the_training_files_alone(files: list[str], tmp_path: Path) -> None:
    shares: dict[str, Any] = {contract.SHARES: [1, 1]}
    assert sources(dataset(files, **shares)) == {"numbers": 8, "texts": 8}
    assert sources(dataset(files[1:], train=files, **shares)) == {"texts": 2}


def test_overlong_prompts_are_left_out_before_shares_are_counted(files: list[str]) -> None:
    limits: dict[str, Any] = {"filter_overlong_prompts": True, "max_prompt_length": 4}
    limits |= {"filter_overlong_prompts_workers": 1, contract.SHARES: [1, 2]}
    assert sources(dataset(files, **limits)) == {"numbers": 4, "texts": 8}


def test_a_limit_is_a_sample_of_the_mixture(files: list[str]) -> None:
    assert sources(dataset(files, limit=3)) == {"numbers": 3}
    shuffled: dict[str, Any] = {"limit": 5, "shuffle": True, "seed": 1}
    first, again = (dataset(files, **shuffled) for _ in range(2))
    assert len(first) == 5
    assert [first[n]["raw_prompt"] for n in range(5)] == [again[n]["raw_prompt"] for n in range(5)]


def test_verls_data_loader_batches_and_reads_again(files: list[str]) -> None:
    import torch
    from verl.utils.dataset.rl_dataset import collate_fn

    shares: dict[str, Any] = {contract.SHARES: [1, 1]}
    made = dataset(files, **shares)
    [batch] = torch.utils.data.DataLoader(made, batch_size=16, collate_fn=collate_fn)
    assert Counter(batch["data_source"]) == {"numbers": 8, "texts": 8}
    assert set(batch) >= {"raw_prompt", "reward_model", "extra_info", "index", "ability"}
    made.resume_dataset_state()
    assert len(made) == 16


def test_verl_validates_data_sources_whose_rewards_have_other_fields() -> None:
    """DAPO's scorer reports its answer, the others only a score; verl has None in the places of missing fields."""
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    infos = {"reward": [1.0, -1.0], "acc": [1.0, 0.0], "score": [None, -1.0], "pred": [None, "3"]}
    found = process_validation_metrics(["flashrl/exact", "math_dapo"], ["a", "b"], infos)
    assert found["flashrl/exact"]["acc"]["mean@1"] == 1.0
    assert found["math_dapo"]["score"]["mean@1"] == -1.0


def test_another_version_of_verl_is_refused(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.9.2")
    with pytest.raises(RuntimeError, match=r"0\.9\.1 only"):
        dataset(files)
