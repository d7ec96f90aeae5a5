"""What benchmarks.parity asks of each run, and what benchmarks.parity_report makes of the results."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from benchmarks import parity, parity_report, warm_up

SEEDS = (0, 1, 2)


def estimate(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "lo": accuracy - 0.01, "hi": accuracy + 0.01, "n": 4, "prompts": 1, "right": "4"}


def run(setting: str, seed: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """A record as benchmarks.parity writes it, of two steps; not evaluated without an accuracy."""
    steps = {
        **{name: [0.1 * (seed + 1), 0.2] for name in (*parity.METRICS, *(f"seconds.{p}" for p in parity.PHASES))},
        "prompt_length": [100.0 + seed, 90.0],
        "truncated": [None, None],
        "step": [1, 2],
    }
    (group,) = (one.group for one in parity.SETTINGS if one.name == setting)
    return {
        "schema_version": 1,
        "name": f"{setting}-seed{seed}",
        "setting": setting,
        "group": group,
        "seed": seed,
        "asked": {"profile": "smollm2", "model": "m", "steps": 2, "sets": ["algorithm.lr=5e-6", "verl.data.seed=1"]},
        "machine": {"device": "a GPU", "cores": 16, "versions": {"verl": "0.9.1"}},
        "at_once": 3,
        "metrics": steps,
        "evaluation": {} if accuracy is None else {kind: estimate(accuracy) for kind in parity_report.KINDS},
        "failed": None,
        **changes,
    }


def document(tmp_path: Path, *runs: dict[str, Any], base: float | None = 0.05) -> dict[str, Any]:
    """The document of a state with these records."""
    for one in runs:
        parity.write_record(tmp_path / f"{one['name']}.json", one)
    if base is not None:
        evaluation = {kind: estimate(base) for kind in parity_report.KINDS}
        about = {"name": "base", "fingerprint": "f", "asked": {"profile": "smollm2"}, "evaluation": evaluation}
        parity.write_record(tmp_path / "base-f.json", about)
    return parity.collect([tmp_path])


# Statistics


@pytest.mark.parametrize(
    ("freedom", "share", "t"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (6, 0.95, 2.447), (7, 0.99, 3.499), (30, 0.95, 2.042)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, share: float, t: float) -> None:
    assert parity_report.quantile(share, freedom) == pytest.approx(t, abs=5e-4)


def test_two_settings_are_compared_by_the_paired_t_test() -> None:
    base, other = {0: 0.10, 1: 0.12, 2: 0.11}, {0: 0.11, 1: 0.12, 2: 0.13}
    apart = [other[seed] - base[seed] for seed in SEEDS]
    found = parity_report.differences({"bf16": base, "int8": other}, "bf16")["int8"]
    assert found.value == pytest.approx(statistics.fmean(apart))
    assert found.error == pytest.approx(statistics.stdev(apart) / math.sqrt(3))
    assert (found.freedom, found.seeds) == (2, 3)
    assert found.half == pytest.approx(4.3027 * statistics.stdev(apart) / math.sqrt(3), rel=1e-4)


def test_what_seeds_have_in_common_is_no_noise() -> None:
    outcomes = {name: {seed: 0.1 * seed + shift for seed in SEEDS} for name, shift in (("a", 0.0), ("b", 0.01))}
    found = parity_report.differences(outcomes, "a")["b"]
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.distinguishable


def test_only_seeds_that_all_settings_have_are_compared() -> None:
    outcomes = {"a": {0: 0.1, 1: 0.2, 2: 0.9}, "b": {0: 0.2, 1: 0.2}, "c": {0: 0.1, 1: 0.3, 2: 0.3}, "none": {}}
    found = parity_report.differences(outcomes, "a")
    assert {name: (one.seeds, one.freedom) for name, one in found.items()} == {"b": (2, 2), "c": (2, 2)}
    assert found["b"].value == pytest.approx(0.05)


def test_a_single_seed_has_a_difference_without_an_interval() -> None:
    found = parity_report.differences({"a": {0: 0.1}, "b": {0: 0.2}}, "a")["b"]
    assert (found.error, found.lo, found.least, found.distinguishable) == (None, None, None, False)
    assert "says nothing about the noise" in parity_report.sentence("b", "a", found)


@pytest.mark.parametrize(
    ("outcomes", "base"),
    [({"a": {0: 1.0}}, "a"), ({"b": {0: 1.0}, "c": {0: 1.0}}, "a"), ({"a": {0: 1.0}, "b": {1: 1.0}}, "a")],
)
def test_nothing_is_compared_without_runs_to_compare(outcomes: parity_report.Outcomes, base: str) -> None:
    assert parity_report.differences(outcomes, base) == {}


def test_the_least_difference_is_found_in_four_of_five_experiments() -> None:
    found = parity_report.Difference(value=0.0, seeds=3, error=0.01, freedom=6)
    assert found.least == pytest.approx((2.4469 + 0.9057) * 0.01, rel=1e-4)


# What is said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-0.002, "0.2 points below `bf16` (95 % interval -2.6 to +2.2, 3 seeds): not distinguishable."),
        (0.002, "0.2 points above `bf16`"),
        (-0.05, "5.0 points below `bf16` (95 % interval -7.4 to -2.6, 3 seeds): more than the seeds' noise explains."),
    ],
)
def test_a_sentence_says_what_the_interval_supports(value: float, said: str) -> None:
    found = parity_report.Difference(value=value, seeds=3, error=0.01, freedom=6)
    assert said in parity_report.sentence("int8", "bf16", found)


def test_the_page_says_what_is_missing_and_what_was_given_up(tmp_path: Path) -> None:
    runs = [run("bf16", seed, 0.10 + seed / 100) for seed in SEEDS] + [
        run("int8", seed, 0.11 + seed / 90) for seed in SEEDS
    ]
    failed = run("int8-tis2", 0, None, failed="error: step 2: the rollout engine does not sample\nmore")
    found = document(tmp_path, *runs, failed)
    text = parity_report.verdicts(lambda _: found)
    assert (
        "`bf16` answers 11.0 ± 0.6 % of the sampled responses right after training, 6.0 points more than the 5.0 %"
        in text
    )
    assert "`int8` is 1.1 points above `bf16`" in text
    assert "`int8-tis2` was not measured yet." in text
    assert "`int8-tis2-seed0` was given up after step 2: error: step 2: the rollout engine does not sample\n" in text
    assert "`hard-bf16` was not measured yet" in text
    table = parity_report.accuracy_table(lambda _: found)
    assert "| before |  |  |  | 5.0 (4.0 to 6.0) | 5.0 (4.0 to 6.0) |  |" in table
    assert "| `bf16` | 3 | 0.200 ± 0.029 |" in table
    assert "| `int8-tis2` | 0 | not measured yet |" in table


def test_runs_of_a_seed_that_saw_other_prompts_are_named(tmp_path: Path) -> None:
    other = run("int8", 1, 0.1)
    found = document(tmp_path, run("bf16", 0, 0.1), run("int8", 0, 0.1), run("bf16", 1, 0.1), other)
    assert parity_report.same_prompts(found) == []
    other["metrics"]["prompt_length"] = [3.0]  # a run may have fewer steps
    found = document(tmp_path, other)
    assert parity_report.same_prompts(found) == ["The runs of seed 1 did not see the same prompts in the same order."]


def test_pictures_show_means_over_seeds(tmp_path: Path) -> None:
    found = document(tmp_path, *(run("bf16", seed, 0.1) for seed in SEEDS))
    by_title = {panel.title: panel for panel in parity_report.panels(found, "usual")}
    (reward,) = by_title["reward"].series
    assert (reward.label, reward.xs) == ("bf16", [1, 2])
    assert reward.ys[0] == pytest.approx(0.2)
    assert reward.his[0] - reward.los[0] == pytest.approx(2 * 0.1 / math.sqrt(3))
    assert not any("truncated" in title for title in by_title), "bf16 without a correction has no weights"
    assert parity_report.panels(found, "hard") == []


def test_a_document_without_runs_makes_a_page(tmp_path: Path) -> None:
    found = parity.collect([tmp_path])
    for table in parity_report.TABLES.values():
        table(lambda _: found)
    assert "not measured yet" in parity_report.pictures(lambda _: found)


# Records


def test_states_are_joined_with_the_complete_run_of_each_name(tmp_path: Path) -> None:
    begun, done = run("bf16", 0, None), run("bf16", 0, 0.1)
    shorter = copy.deepcopy(begun)
    shorter["metrics"]["step"] = [1]
    for folder, record in (("a", begun), ("b", done), ("c", shorter)):
        parity.write_record(tmp_path / folder / "bf16-seed0.json", record)
    for order in ("abc", "cba"):
        (found,) = parity.collect([tmp_path / folder for folder in order])["runs"]
        assert found == done
    (found,) = parity.collect([tmp_path / "c", tmp_path / "a"])["runs"]
    assert found == begun


def test_states_of_two_profiles_are_refused(tmp_path: Path) -> None:
    other = run("int8", 0, 0.1)
    other["asked"]["profile"] = "tiny"
    with pytest.raises(SystemExit, match="several profiles: smollm2, tiny"):
        document(tmp_path, run("bf16", 0, 0.1), other)


def test_lists_of_numbers_are_one_line() -> None:
    record = {"a": [1, 2.5, None], "b": ["x", "y"], "c": [[1, 2], [3]], "d": [], "e": {"f": [0.1]}}
    text = parity.json_text(record)
    assert json.loads(text) == record
    assert '"a": [1, 2.5, null]' in text


# What is asked of each run


def study(tmp_path: Path, *words: str) -> parity.Study:
    found = parity.Study(parity.options(["--state", str(tmp_path), *words]))
    found.base_model = "/models/m"
    return found


def options_of(command: list[str]) -> dict[str, str]:
    """The value that each key ends with, and `--rollout` and `--tis`."""
    sets = [word for before, word in pairwise(command) if before == "--set"]
    named = {name: command[command.index(name) + 1] for name in ("--rollout", "--tis")}
    return dict(one.split("=", 1) for one in sets) | named


@pytest.mark.parametrize("profile", parity.PROFILES)
def test_settings_of_a_group_differ_in_the_rollout_alone(profile: str, tmp_path: Path) -> None:
    found = study(tmp_path, "--profile", profile)
    for group in parity_report.GROUPS:
        mine = [one for one in found.runs if one.setting.group == group and one.seed == 0]
        base, *others = (options_of(found.train_command(one, 60)) for one in mine)
        assert base["--rollout"] == "bf16"
        assert base["--tis"] == "off"
        for other in others:
            differing = {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)}
            assert differing <= {"--rollout", "--tis", "rollout.kv_cache"}


def test_seeds_differ_in_the_seeds_alone(tmp_path: Path) -> None:
    found = study(tmp_path, "--profile", "smollm2")
    one, other = (options_of(found.train_command(found.by_name[f"int8-seed{seed}"], 60)) for seed in (0, 2))
    differing = {key: (one[key], other[key]) for key in one if one[key] != other[key]}
    assert differing == dict.fromkeys(parity.SEEDS, ("0", "2"))


def test_all_settings_of_a_seed_come_before_the_next_seed(tmp_path: Path) -> None:
    assert [one.seed for one in study(tmp_path, "--only", "bf16,int8").runs] == [0, 0, 1, 1, 2, 2]


def test_options_for_every_run_do_not_undo_the_hard_ones(tmp_path: Path) -> None:
    found = study(tmp_path, "--profile", "smollm2", "--set", "algorithm.lr=1e-5", "--set", "data.train_batch_size=64")
    usual, hard = (
        options_of(found.train_command(found.by_name[f"{name}-seed0"], 60)) for name in ("bf16", "hard-bf16")
    )
    assert (usual["algorithm.lr"], hard["algorithm.lr"]) == ("1e-5", "8e-5")
    assert usual["data.train_batch_size"] == hard["data.train_batch_size"] == "64"


def test_runs_that_share_a_gpu_share_its_memory(tmp_path: Path) -> None:
    alone, three = study(tmp_path), study(tmp_path, "--gpus", "0,1", "--jobs", "6")
    name = "int8-seed0"
    single = options_of(alone.train_command(alone.by_name[name], 60))
    assert single["rollout.gpu_memory_utilization"] == "0.4"
    assert "resources.gpu_memory_gib" not in single
    shared = dict(one.split("=") for one in parity.shared_memory(three.each, 140.0))
    assert shared["rollout.gpu_memory_utilization"] == "0.15"
    assert shared["resources.gpu_memory_gib"] == "42.0"
    assert any("kv_cache_memory_bytes" in key for key in shared)
    assert shared.keys() <= options_of(three.train_command(three.by_name[name], 60)).keys()
    cache = "verl.+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes"
    eight = dict(one.split("=") for one in parity.shared_memory(8, 140.0))
    assert (shared[cache], eight[cache]) == (str(8 << 30), str(int(0.25 * 0.9 * 140 / 8 * 2**30)))


@pytest.mark.parametrize(("jobs", "alone"), [("1", True), ("2", False)])
def test_evaluations_beside_runs_take_a_fixed_part_of_the_gpu(tmp_path: Path, jobs: str, alone: bool) -> None:
    line = study(tmp_path, "--jobs", jobs).evaluate_command("greedy", ["base"])
    assert line[line.index("--gpu-memory-utilization") + 1] == ("0.4" if alone else "0.05")
    assert ("--kv-memory" not in line) is alone


def test_a_state_of_other_options_is_refused(tmp_path: Path) -> None:
    first = study(tmp_path)
    parity.write_record(tmp_path / "bf16-seed0.json", {"name": "bf16-seed0", "asked": first.asked(first.runs[0])})
    first.refuse_others()
    with pytest.raises(SystemExit, match=r"bf16-seed0\.json is of a run with other options"):
        study(tmp_path, "--steps", "10").refuse_others()


@pytest.mark.parametrize(
    ("done", "left", "measured", "target"),
    [
        (0, math.inf, False, 60),
        (0, 820, True, 60),  # 100 to start, 600 for steps, 120 to evaluate
        (0, 810, True, 60),  # all steps, the evaluation comes next time
        (0, 500, True, 37),
        (0, 500, False, 60),  # nothing is known yet: it is stopped instead
        (40, 500, True, 60),
        (0, 150, True, None),
        (57, 150, True, 60),
        (57, 120, True, None),
    ],
)
def test_a_run_is_taken_as_far_as_the_time_allows(done: int, left: float, measured: bool, target: int | None) -> None:
    pace = parity.Pace(start_s=100, step_s=10, evaluate_s=120, measured=measured)
    assert pace.target(done, 60, left) == target


@pytest.mark.parametrize(("done", "left", "target"), [(0, 700, 60), (0, 690, None), (40, 300, 60), (40, 290, None)])
def test_only_runs_that_can_end_are_begun_where_the_rest_is_lost(done: int, left: float, target: int | None) -> None:
    pace = parity.Pace(start_s=100, step_s=10, evaluate_s=120, measured=True)
    assert pace.target(done, 60, left, whole=True) == target


# What is started when


class Ended:
    """A process that is over."""

    returncode = 0

    def poll(self) -> int:
        return self.returncode


class Instant(parity.Shop):
    """Commands that are over as soon as the shop looks; `begun` has what was started: kind and runs."""

    def __init__(self, study: parity.Study, seconds: float, code: int = 0) -> None:
        super().__init__(study, None, [])
        self.begun: list[tuple[str, tuple[str, ...]]] = []
        self.seconds, self.code = seconds, code
        self.done: set[str] = set()

    @property
    def left(self) -> float:
        return self.seconds

    def _begin(self, kind: str, runs: tuple[str, ...], argv: Sequence[str], name: str) -> None:
        self.begun.append((kind, runs))
        process = Ended()
        process.returncode = self.code
        nowhere = Path("/nonexistent")
        self.children.append(parity.Child(kind, runs, cast("Any", process), None, nowhere, nowhere, nowhere))

    def _trained(self, child: parity.Child) -> None:
        if self.code:
            super()._trained(child)
            return
        self.seconds -= 300
        (name,) = child.runs
        place = self.study.work / "checkpoints" / "p" / name
        (place / f"global_step_{self.study.given.steps}").mkdir(parents=True)
        (place / "latest_checkpointed_iteration.txt").write_text(str(self.study.given.steps), encoding="utf-8")

    def _evaluated(self, child: parity.Child) -> None:
        self.seconds -= 50
        for name in child.runs:
            record = self.study.record(name)
            evaluation = {**record.get("evaluation", {}), child.kind: {}}
            parity.write_record(self.study.record_path(name), {**record, "evaluation": evaluation})


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the driver."""
    about = {"device": "a GPU", "memory_gib": 140.0, "gpus": 2, "cores": 16, "versions": {}}
    monkeypatch.setattr(parity, "machine", lambda: about)


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "LOOK_S", 0.0)


def shop(tmp_path: Path, seconds: float, *words: str, code: int = 0) -> Instant:
    """A shop for two settings of two seeds, 180 + 60 * 2 s each by its guess."""
    found = study(tmp_path, "--profile", "smollm2", "--only", "bf16,int8", "--seeds", "0,1", *words)
    found.profile = dataclasses.replace(found.profile, step_s=2.0)
    return Instant(found, seconds, code)


@pytest.mark.usefixtures("_no_waiting")
def test_everything_is_trained_and_evaluated_once(tmp_path: Path) -> None:
    one = shop(tmp_path, 10_000, "--jobs", "2")
    one.work()
    trained = [name for kind, (name, *_) in one.begun if kind == "train"]
    assert trained == ["bf16-seed0", "int8-seed0", "bf16-seed1", "int8-seed1"]
    for kind in parity.EVALUATIONS:
        together = [runs for begun, runs in one.begun if begun == kind]
        assert together == [("base", "bf16-seed0", "int8-seed0"), ("bf16-seed1", "int8-seed1")]
    again = Instant(one.study, 10_000)
    again.work()
    assert again.begun == []


@pytest.mark.usefixtures("_no_waiting")
def test_nothing_is_started_that_cannot_end(tmp_path: Path) -> None:
    one = shop(tmp_path, 500)  # one run is done, and its evaluation; then 150 s are left
    one.work()
    assert [kind for kind, _ in one.begun] == ["train", "greedy", "sampled"]
    later = Instant(one.study, 170)
    later.work()
    assert later.begun == []


@pytest.mark.usefixtures("_no_waiting")
def test_what_an_earlier_call_trained_is_evaluated_first(tmp_path: Path) -> None:
    one = shop(tmp_path, 400)
    one.work()
    assert [kind for kind, _ in one.begun] == ["train"]
    later = Instant(one.study, 2_000)
    later.work()
    assert later.begun[:3] == [
        ("greedy", ("base", "bf16-seed0")),
        ("sampled", ("base", "bf16-seed0")),
        ("train", ("int8-seed0",)),
    ]


@pytest.mark.usefixtures("_no_waiting")
def test_a_run_that_fails_twice_is_given_up_until_it_is_asked_for_again(tmp_path: Path) -> None:
    one = shop(tmp_path, 10_000, "--seeds", "0", code=1)
    one.work()
    assert [name for kind, (name, *_) in one.begun if kind == "train"] == ["bf16-seed0"] * 2 + ["int8-seed0"] * 2
    again = shop(tmp_path, 10_000, "--seeds", "0")
    again.work()
    assert "train" not in [kind for kind, _ in again.begun]
    asked = shop(tmp_path, 10_000, "--seeds", "0", "--retry")
    asked.work()
    assert [name for kind, (name, *_) in asked.begun if kind == "train"] == ["bf16-seed0", "int8-seed0"]
    assert asked.study.record("bf16-seed0")["failed"] is None


# The warm-up


def test_batches_hold_each_example_once_by_length() -> None:
    import random

    found = [warm_up.Example(range(n), range(1)) for n in (5, 9, 1, 7, 3, 8, 2, 6, 4)]
    (one, other) = list(warm_up.batches(found, 4, 2, random.Random(0)))
    lengths = [[len(example) for example in micro] for micro in (*one, *other)]
    assert len({length for micro in lengths for length in micro}) == 8
    for batch in (one, other):
        assert max(map(len, batch[0])) <= min(map(len, batch[1]))
