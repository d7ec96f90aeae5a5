"""Guesses at what was meant."""

from __future__ import annotations

import pytest

from flashrl_cli.config import yaml_file

KEYS = ["data.train", "data.train_batch_size", "algorithm.lr", "algorithm.mini_batch_size", "critic.lr", "rollout.n"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("INT8", ["int8"]),
        ("“int8”", ["int8"]),
        ("int-8", ["int8"]),
        ("int", ["int8"]),
        ("nothing like it", []),
        ("", []),
    ],
)
def test_nearest(text, names):
    assert yaml_file.nearest(text, ["bf16", "fp8", "int8"]) == names


def test_nearest_folds_before_it_compares():
    assert yaml_file.nearest("A1", ["a-1", "a-2"]) == ["a-1"]
    assert set(yaml_file.nearest("name-3", ["name-1", "name-2"])) == {"name-1", "name-2"}
    assert len(yaml_file.nearest("name-3", ["name-1", "name-2"], 1)) == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("algorithm.lr", "algorithm.lr"),
        ("Algorithm.LR", "algorithm.lr"),
        ("algorithm/lr", "algorithm.lr"),
        ("--algorithm.lr", "algorithm.lr"),
        ("algorithm.lr:1e-6", "algorithm.lr"),
        ("algorithm.lr=1e-6", "algorithm.lr"),
        ("data.train batch-size", "data.train_batch_size"),
        ("lr", None),
        ("algorithm.l_r", None),
    ],
)
def test_same_key(text, key):
    assert yaml_file.same_key(text, KEYS) == key


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("lr", ["algorithm.lr", "critic.lr"]),
        ("critic.lrr", ["critic.lr"]),
        ("n", ["rollout.n"]),
        ("rollouts.n", ["rollout.n"]),
        ("data.batch_size", ["data.train_batch_size"]),
        ("batch_size", ["data.train_batch_size", "algorithm.mini_batch_size"]),
        ("data.trian", ["data.train"]),
        ("data.quite_else", []),
        ("nothing.at.all", []),
    ],
)
def test_nearest_keys(text, keys):
    assert yaml_file.nearest_keys(text, KEYS) == keys


@pytest.mark.parametrize(
    ("value", "readings"),
    [
        (8.0, [8, "8.0"]),
        (8.5, ["8.5"]),
        (1, [True, "1"]),
        (True, [True, "true"]),
        (None, [None]),
        ([7], [7]),
        ([7, 8], []),
        ("off", [None, False]),
        ("yes", [True]),
        ("", [None]),
        ("1e-6,", [1e-6]),
        ("“2”", [2]),
        ("1,024", [1024]),
        ("1_024_000", [1024000]),
        ("0,5", [0.5]),
        ("50%", [0.5]),
        ("1k", []),
        ("x", []),
    ],
)
def test_readings(value, readings):
    assert list(yaml_file.readings(value)) == readings


def test_a_name_where_a_list_belongs_is_added_to_its_usual_items():
    assert next(yaml_file.readings("wandb", ("console", "file"))) == ["console", "file", "wandb"]
    assert next(yaml_file.readings("file, wandb", ("console", "file"))) == ["console", "file", "wandb"]
