"""Rules between the values of a spec: each holds for the shipped presets and catches its mistake."""

from __future__ import annotations

import pytest

from flashrl_cli.config import presets
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.rules import RULES
from flashrl_cli.errors import InputError


@pytest.mark.parametrize("name", presets.names())
def test_shipped_presets_keep_all_rules(name):
    assert load_spec(name).spec.name == name


CASES = [
    ("mini_batch_divides_batch", "algorithm.mini_batch_size=513", "is more than data.train_batch_size = 512"),
    ("mini_batch_divides_batch", "algorithm.mini_batch_size=100", "does not divide data.train_batch_size = 512"),
    ("group_has_members", "rollout.n=1", "GRPO needs more than one response"),
    ("metrics_are_written", "trainer.logger=[console]", "lacks file"),
    ("overlong_fits", "reward.overlong.buffer_len=20481", "is more than data.max_response_length = 20480"),
    ("overlong_fits", "reward.manager=naive", "manager naive does not know it"),
]


@pytest.mark.parametrize(("rule", "text", "part"), CASES)
def test_broken(rule, text, part):
    with pytest.raises(InputError) as caught:
        load_spec("dapo-32b", sets=[text])
    (problem,) = caught.value.problems
    assert part in problem.message
    assert problem.hint


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in RULES} == {rule for rule, _, _ in CASES}
