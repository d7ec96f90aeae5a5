"""What verl would refuse later: each rule finds its mistake, its hint fixes it, and what just works is let through."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from typing import get_args

import pytest

from flashrl_cli.config import presets
from flashrl_cli.config.spec import By, Estimator, Loss, RejectSpec
from flashrl_cli.errors import Problem
from flashrl_cli.memory.model import shape_of
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.verl import compose, lint
from flashrl_cli.verl.environment import LOGGERS
from flashrl_cli.verl.lint.devices import cpus_needed
from flashrl_cli.verl.overrides import verl_loss, verl_rejection
from tests.contract.demands_case import A, Case, settings
from tests.contract.demands_of_batches import BATCHES, VALUES
from tests.contract.demands_of_devices import DEVICES
from tests.contract.demands_of_learning import LEARNING
from tests.contract.demands_of_rollouts import ROLLOUTS
from tests.contract.demands_of_sampling import SAMPLING

CASES = [*VALUES, *BATCHES, *DEVICES, *ROLLOUTS, *SAMPLING, *LEARNING]
RULES = {rule.__name__: rule for rule in lint.RULES}


def test_the_shortcut_gives_the_composed_tree():
    made = settings("dapo-32b")
    assert made.tree.container() == compose.tree([str(override) for override in made.overrides]).container()


@pytest.mark.parametrize("name", presets.names())
def test_shipped_presets_demand_nothing_that_verl_lacks(name, tmp_path):
    refused = set()
    # an asynchronous mode is refused without a correction, before verl is asked
    without = () if "async" in name else ("correction.cap=null",)
    caps = (*without, "correction.cap=2", "correction.cap=8")
    for precision in PRECISIONS:
        for cap in caps:
            s = settings(name, (cap,), precision)
            shape = shape_of(s.spec.model.path, tmp_path)
            if lint.problems(s.resolved, s.overrides, s.tree, shape):
                refused.add((precision, bool(shape and shape.experts), s.has_adapter))
    # INT8 takes neither experts nor adapters that are not merged; FP8 no adapters
    assert all(adapter or (precision in {"int8", "fp8"} and experts) for precision, experts, adapter in refused)


def found(c: Case, *more: str) -> list[Problem]:
    return list(RULES[c.rule](settings(c.preset, (*c.sets, *more), c.rollout, c.shape)))


@pytest.fixture(autouse=True)
def local_run(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def identity(c: Case) -> str:
    return f"{c.rule}-{c.sets[0] if c.sets else c.rollout}"


@pytest.mark.parametrize("c", CASES, ids=identity)
def test_a_mistake_is_reported_and_its_neighbour_is_not(c):
    problem = found(c)[0]
    assert c.says in problem.message
    assert c.hint in (problem.hint or "")
    assert str(problem.where).startswith(c.where or f"--set {c.sets[0].partition('=')[0]}")
    neighbour = settings(c.preset, c.legal, c.rollout, c.legal_shape or c.shape)
    assert list(RULES[c.rule](neighbour)) == []


CONCRETE = [c for c in CASES if c.hint.startswith(("--set ", "=", "'verl.", "verl.", "actor_rollout_ref."))]


@pytest.mark.parametrize("c", CONCRETE, ids=identity)
def test_the_hint_fixes_it(c):
    hint = found(c)[0].hint or ""
    words = shlex.split(hint.partition(" instead")[0].partition(" (")[0])
    assert words[0] == "--set"
    options = [text.removesuffix(",") for before, text in itertools.pairwise(words) if before == "--set"]
    moved = "instead" in hint or c.rule == "engine_arguments_are_said_once"
    replaced = {text.partition("=")[0] for text in options}
    kept = () if moved else tuple(text for text in c.sets if text.partition("=")[0] not in replaced)
    assert found(replace(c, sets=kept), *options) == []


def test_every_rule_has_a_case():
    assert set(RULES) == {c.rule for c in CASES}


def test_rules_say_where_they_are_known_from():
    for rule in lint.RULES:
        assert ".py:" in (rule.__doc__ or "") or "plugins/" in (rule.__doc__ or ""), rule.__name__


def test_what_the_others_rely_on_is_reported_alone():
    s = settings("gsm8k-0.5b", (f"verl.{A}.strategy=megatron", "algorithm.micro_batch_size_per_gpu=5"))
    (problem,) = lint.problems(s.resolved, s.overrides, s.tree)
    assert "megatron" in problem.message


def test_all_mistakes_are_reported_at_once():
    sets = ("algorithm.micro_batch_size_per_gpu=5", "rollout.tensor_parallel=3", "trainer.logger=[file,x]")
    s = settings("gsm8k-0.5b", sets)
    assert len(lint.problems(s.resolved, s.overrides, s.tree)) == 3


def test_one_cause_is_reported_once():
    """What the log-probs and the reference policy take over from the actor is the actor's."""
    budgets = ("algorithm.max_tokens_per_gpu=99", "rollout.log_prob_max_tokens_per_gpu=null")
    packing = ("model.packing=false", f"verl.{A}.ulysses_sequence_parallel_size=2")
    sets = ("algorithm.kl_loss=true", *budgets, *packing)
    s = settings("gsm8k-0.5b", sets)
    found = [str(problem.where) for problem in lint.problems(s.resolved, s.overrides, s.tree)]
    assert found == ["--set algorithm.max_tokens_per_gpu", "--set model.packing"]


def test_a_file_that_exists_scores(tmp_path):
    file = tmp_path / "reward.py"
    file.touch()
    s = settings("gsm8k-0.5b", (f"verl.reward.custom_reward_function.path={file}",))
    assert lint.problems(s.resolved, s.overrides, s.tree) == []


def test_the_remote_reward_manager_takes_cpus_in_every_worker():
    plain, remote = (settings("gsm8k-0.5b", (f"reward.manager={name}",)) for name in ("naive", "remote"))
    assert (cpus_needed(plain), cpus_needed(remote)) == (3 * 4 + 1 + 8, 3 * 4 + 1 + 8 + 8 * 8)


def test_names_are_verls():
    """The sources, not the modules: importing them takes torch."""
    root = compose.config_folder().parents[1]
    losses = (root / "trainer/ppo/core_algos.py").read_text().split('@register_policy_loss("')[1:]
    assert {*map(verl_loss, get_args(Loss)), "bypass_mode"} == {text.partition('"')[0] for text in losses}
    tracking = (root / "utils/tracking.py").read_text().partition("supported_backend = [")[2].partition("]")[0]
    assert set(LOGGERS) == set(tracking.replace('"', "").replace(",", "").split())
    helper = (root / "trainer/ppo/rollout_corr_helper.py").read_text()
    options = helper.partition("SUPPORTED_ROLLOUT_RS_OPTIONS: set[str] = {")[2].partition("}")[0]
    ours = {
        verl_rejection(RejectSpec(by=by, estimator=estimator, upper=2.0))
        for by, estimator in itertools.product(get_args(By), get_args(Estimator))
    }
    assert ours - {"seq_max_k1"} == set(options.replace('"', "").replace(",", "").split())
