"""From preset and options to a spec: values, origins, and mistakes with their place and hint.

The mistakes that people type are in tests/unit/cli/test_bad_input.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flashrl_cli.config import diagnose
from flashrl_cli.config.correction import BY_LOSS
from flashrl_cli.config.diagnose import Suggestion, keys_of
from flashrl_cli.config.layers import Layer, Origin
from flashrl_cli.config.resolve import Options, read_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.render.output import print_error
from tests.specs import load_spec

BASE = """\
model: {path: Qwen/Qwen3-0.6B}
data: {train: gsm8k, val: gsm8k, train_batch_size: 64, max_prompt_length: 100, max_response_length: 28}
algorithm: {advantage: grpo, lr: 1e-6, mini_batch_size: 32}
rollout: {n: 8}
trainer: {project: p}
"""


@pytest.fixture
def preset(tmp_path):
    """Writes a preset of BASE and more, returns its path as text."""

    def write(more: str = "", base: str = BASE) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(base + more)
        return str(path)

    return write


def problems(*args, **options) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load_spec(*args, **options)
    assert f"{len(caught.value.problems)} problem" in caught.value.message
    return list(caught.value.problems)


def test_values_and_origins(preset):
    resolved = load_spec(
        preset("env: {A: 1}\nverl: {trainer.x.y: [1, b]}\n"), rollout="int8", tis="2", sets=["rollout.n=4"]
    )
    spec, origins = resolved.spec, resolved.origins
    assert (spec.name, spec.algorithm.lr, spec.rollout.n) == ("mine", 1e-6, 4)
    assert (spec.rollout.precision, spec.correction.cap) == ("int8", 2.0)
    assert (spec.env, spec.verl) == ({"A": "1"}, {"trainer.x.y": [1, "b"]})
    assert str(origins["algorithm.lr"]).endswith("mine.yaml:3")
    assert origins["rollout.n"] == Origin("set", Location("--set", key="rollout.n"))
    assert origins["rollout.precision"] == Origin("option", Location("--rollout"))
    assert origins["correction.cap"] == Origin("option", Location("--tis"))
    assert origins["rollout.top_p"] == Origin("default")
    assert str(origins["verl.trainer.x.y"]).endswith("mine.yaml:7")
    assert resolved.value("rollout.max_model_len") == 128
    assert str(origins["rollout.max_model_len"]).startswith("derived: data.max_prompt_length")


def test_every_leaf_has_an_origin(preset):
    resolved = load_spec(preset(), sets=["reward.manager=dapo", "reward.overlong.buffer_len=8"])
    assert resolved.is_set("reward.overlong.buffer_len")
    assert not resolved.is_set("reward.overlong.log")
    assert resolved.origins["reward.overlong.log"] == Origin("default")
    assert "reward.overlong" not in resolved.origins
    assert load_spec(preset()).value("reward.overlong.log") is None


def test_specs_are_immutable(preset):
    with pytest.raises(ValidationError, match="frozen"):
        load_spec(preset()).spec.rollout.n = 3  # type: ignore[misc]


def test_gae_derives_the_critic(preset):
    spec = load_spec(preset(), sets=["algorithm.advantage=gae", "critic.micro_batch_size_per_gpu=4"]).spec
    assert (spec.critic.path, spec.critic.max_tokens_per_gpu) == ("Qwen/Qwen3-0.6B", 4 * 128)
    assert load_spec(preset()).spec.critic.path is None


@pytest.mark.parametrize(
    ("base", "mine", "sets", "validates"),
    [
        ("", "", "", False),
        ("", "validate_every: 5", "", True),
        ("", "validate_every: 5", "validate_every=-1", False),
        ("", "validate_before: true", "", True),
        ("", "", "validate_before=true", True),
        ("validate_before: true, validate_every: -1", "", "", True),
        ("validate_before: true, validate_every: 5", "", "validate_every=-1", False),
        ("validate_before: true, validate_every: 5", "validate_every: -1", "", False),
        ("validate_every: 5", "validate_before: true", "validate_every=-1", False),
        ("validate_every: -1", "validate_before: true", "", True),
        ("", "", "validate_before=true validate_every=-1", True),
    ],
)
def test_who_switches_validation_off_gets_none_before_the_start(base, mine, sets, validates, preset, tmp_path):
    (tmp_path / "lower.yaml").write_text(f"extends: {preset()}\ntrainer: {{{base}}}\n")
    upper = tmp_path / "upper.yaml"
    upper.write_text(f"extends: {tmp_path}/lower.yaml\ntrainer: {{{mine}}}\n")
    resolved = load_spec(str(upper), sets=[f"trainer.{one}" for one in sets.split()])
    assert resolved.spec.trainer.validate_before is validates
    derived = Origin("derived", reason="trainer.validate_every = -1")
    assert (resolved.origins["trainer.validate_before"] == derived) is not validates


def test_a_preset_that_validates_now_and_then_need_not_validate_its_start(preset):
    text = BASE.replace("{project: p}", "{project: p, validate_every: 5, validate_before: false}")
    assert not load_spec(preset(base=text)).spec.trainer.validate_before


@pytest.mark.parametrize(
    ("parent", "child", "sets", "tis", "weights"),
    [
        ("", "", "", None, ("none", None, None)),
        ("cap: 2", "", "", None, ("tis", 2.0, None)),
        ("kind: tis", "", "", None, ("tis", 2.0, None)),
        ("kind: icepop", "", "", None, ("icepop", 5.0, 0.5)),
        ("kind: icepop, cap: 3, lower: 0.3", "", "", None, ("icepop", 3.0, 0.3)),
        ("kind: seq-tis, cap: 3", "", "", None, ("seq-tis", 3.0, None)),
        ("cap: 2", "kind: none", "", None, ("none", None, None)),
        ("cap: 2", "kind: icepop", "", None, ("icepop", 2.0, 0.5)),
        ("kind: none", "cap: 2", "", None, ("tis", 2.0, None)),
        ("kind: icepop", "", "correction.cap=null", None, ("none", None, None)),
        ("kind: icepop, lower: 0.3", "", "correction.kind=tis", None, ("tis", 2.0, None)),
        ("kind: icepop, lower: 0.3", "", "", "off", ("none", None, None)),
        ("kind: icepop, lower: 0.3", "", "", "8", ("tis", 8.0, None)),
        ("", "", "correction.kind=icepop", "8", ("icepop", 8.0, 0.5)),
    ],
)
def test_the_later_word_on_weights_decides(preset, tmp_path, parent, child, sets, tis, weights):
    (tmp_path / "parent.yaml").write_text(f"{BASE}correction: {{{parent}}}\n")
    (tmp_path / "child.yaml").write_text(f"extends: parent.yaml\nname: child\ncorrection: {{{child}}}\n")
    found = load_spec(str(tmp_path / "child.yaml"), tis=tis, sets=sets.split()).spec.correction
    assert (found.kind, found.cap, found.lower) == weights


def test_rejection_by_k1_is_as_wide_below_as_above(preset):
    found = load_spec(preset("correction: {reject: {by: token, upper: 4}}\n"))
    reject = found.spec.correction.reject
    assert reject
    assert reject.lower == 0.25
    assert str(found.origins["correction.reject.lower"]) == "derived: 1 / correction.reject.upper"
    divergence = load_spec(
        preset("correction: {reject: {by: token, estimator: k3, upper: 4}}\n")
    ).spec.correction.reject
    assert divergence
    assert divergence.lower is None


@pytest.mark.parametrize("loss", BY_LOSS)
def test_a_loss_has_its_own_values_unless_they_are_set_beside_it_or_later(preset, loss):
    earlier = "algorithm: {advantage: grpo, lr: 1e-6, mini_batch_size: 32, clip_low: 0.7, clip_high: 0.7, clip_c: 7}"
    path = preset(base=BASE.replace(BASE.splitlines()[2], earlier))
    found = load_spec(path, sets=[f"algorithm.loss={loss}"])
    for name, value in BY_LOSS[loss].items():
        assert getattr(found.spec.algorithm, name) == value
        assert str(found.origins[f"algorithm.{name}"]) == f"derived: algorithm.loss = {loss}"
    beside = load_spec(path, sets=[f"algorithm.loss={loss}", "algorithm.clip_high=0.6"]).spec.algorithm
    assert beside.clip_high == 0.6
    assert load_spec(path, sets=["algorithm.loss=ppo"]).spec.algorithm.clip_high == 0.7


def test_what_is_set_is_not_derived(preset):
    sets = ["algorithm.advantage=gae", "critic.path=/c", "critic.max_tokens_per_gpu=9", "rollout.max_model_len=200"]
    spec = load_spec(preset(), sets=sets).spec
    assert (spec.critic.path, spec.critic.max_tokens_per_gpu, spec.rollout.max_model_len) == ("/c", 9, 200)


def test_missing_keys_are_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    (problem,) = problems(str(tmp_path / "empty.yaml"))
    assert problem.message.startswith("not set: model.path, data.train, data.val, ")
    assert problem.message.endswith("algorithm.mini_batch_size, trainer.project")


def test_one_missing_key(preset):
    assert problems(preset(base=BASE.replace("lr: 1e-6, ", ""))) == [
        Problem("algorithm.lr is not set", None, "set it in the preset, or --set algorithm.lr=…")
    ]


@pytest.mark.parametrize("written", ["LR: 1e-6", "lr:1e-6", "Lr: 1e-6", "l_r: 1e-6", "learn_lr: 1e-6"])
def test_a_misspelled_key_is_not_reported_as_missing_too(preset, written):
    (problem,) = problems(preset(base=BASE.replace("lr: 1e-6", written)))
    assert problem.message.startswith("unknown key algorithm.")
    assert problem.hint == "did you mean algorithm.lr?"


def test_the_value_that_was_meant_is_written_as_it_was(preset):
    assert problems(preset(), rollout="INT8")[0].hint == "did you mean --rollout int8?"
    assert problems(preset(base=BASE.replace("n: 8", "n: 8.0")))[0].hint == "did you mean n: 8?"


@pytest.mark.parametrize(
    ("text", "meant"), [("false", "off"), ("none", "off"), ("0", "off"), ("of", "off"), ("'64'", "64"), ("48", None)]
)
def test_a_block_that_is_none(preset, text, meant):
    (problem,) = problems(preset(), sets=[f"rollout.rotation={text}"])
    assert "should be one of 'auto', 'off', 16, 32, 64 or 128" in problem.message
    assert problem.hint == (f"did you mean --set rollout.rotation={meant}?" if meant else None)


@pytest.mark.parametrize(
    "text", ["rollout.n=many", "rollout.n=-4", "rollout.n=0", "algorithm.lr=nan", "rollout.top_p=2"]
)
def test_no_guess_where_none_would_fit(preset, text):
    assert problems(preset(), sets=[text])[0].hint is None


def test_a_value_over_a_part_is_reported_though_another_layer_covers_it(preset):
    found = problems(preset(), sets=["rollout=8", "rollout.n=4", "algorithm=null"])
    assert [(str(p.where), p.message) for p in found] == [
        ("--set rollout", "rollout = 8: should be a map of keys"),
        ("--set algorithm", "algorithm = null: should be a map of keys"),
    ]


def test_environment_values_are_the_text_that_was_written(preset):
    path = preset("env: {A: 010, B: 1e-6, C: true, D: '1', E: x}\n")
    env = load_spec(path, sets=["env.F=0x10", "env.G=off"]).spec.env
    assert env == {"A": "010", "B": "1e-6", "C": "true", "D": "1", "E": "x", "F": "0x10", "G": "off"}


def test_keys_of_another_program_are_translated(preset):
    translate = {"other.x": Suggestion("it is rollout.n")}.get
    found = read_spec(preset("other: {x: 1}\n"), Options(sets=["foo=1"]), translate).broken
    assert [problem.hint for problem in found] == ["it is rollout.n", found[1].hint]
    assert (found[1].hint or "").startswith("keys of a preset are")


def test_rules_are_reported_with_their_place(preset):
    (problem,) = problems(preset(), sets=["algorithm.mini_batch_size=30"])
    assert problem == Problem(
        "algorithm.mini_batch_size: 30 does not divide data.train_batch_size = 64",
        Location("--set", key="algorithm.mini_batch_size"),
        "--set algorithm.mini_batch_size=16",
    )


def test_an_override_of_a_part_that_is_null(preset):
    path = preset("reward: {manager: dapo, overlong: {buffer_len: 8}}\n")
    assert load_spec(path, sets=["reward.overlong=null"]).spec.reward.overlong is None


ORIGINS = {
    "a.b": Origin("preset", Location("p", 1)),
    "a.c.d": Origin("preset", Location("p", 2)),
    "ab": Origin("default"),
}


@pytest.mark.parametrize(("key", "line"), [("a.b", 1), ("a", 1), ("a.c", 2), ("a.b.0.x", 1), ("ab", None), ("z", None)])
def test_where(key, line):
    assert diagnose.origin_of(key, ORIGINS).where == (line and Location("p", line))


def test_keys_of_sub_parts_are_dotted():
    keys = list(diagnose.keys_of(RunSpec))
    assert {"name", "algorithm.filter_groups.enable", "reward.overlong.buffer_len", "verl"} <= set(keys)
    assert "algorithm.filter_groups" not in keys
    assert len(keys) == len(set(keys))


def shaped(**data: object) -> tuple[object, list[Problem]]:
    problems: list[Problem] = []
    layer = Layer(Origin("preset", Location("p")), data, {"rollout": 3})
    return diagnose.well_shaped(layer, problems).data, problems


def test_values_where_maps_belong_are_taken_out():
    data, problems = shaped(rollout=[1], critic={"lr": 1}, env=None, algorithm={"filter_groups": 2, "lr": 3})
    assert data == {"critic": {"lr": 1}, "algorithm": {"lr": 3}}
    assert [(str(p.where), p.message.partition(":")[0]) for p in problems] == [
        ("p:3", "rollout = [1]"),
        ("p", "env = null"),
        ("p", "algorithm.filter_groups = 2"),
    ]


def test_what_is_no_part_or_may_be_null_stays():
    data = {"name": "x", "unknown": 1, "reward": {"overlong": None}, "verl": {"a": 1}, "trainer": {"logger": ["file"]}}
    assert shaped(**data) == (data, [])
    assert len(shaped(reward={"overlong": 3})[1]) == 1


QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
SCRAPS = st.sampled_from(
    ["\n", "\t", ": ", "- ", "[", "]", "{", "}", "'", '"', "*a", "&a ", "!x ", "<<: ", "---\n", "\0"]
)
TEXT = st.text(max_size=20) | SCRAPS
EDITS = st.lists(st.tuples(st.integers(0, len(BASE)), TEXT, st.integers(0, 3)), min_size=1, max_size=4)


def loads_or_is_refused(preset: Path, *sets: str) -> None:
    """Load a preset; the only thing that may come of it is an InputError, and it can be printed."""
    try:
        load_spec(str(preset), sets=sets)
    except InputError as error:
        print_error(error)


@given(EDITS)
@QUICK
def test_a_preset_edited_at_random(tmp_path: Path, edits: list[tuple[int, str, int]]) -> None:
    text = BASE
    for start, new, dropped in edits:
        text = text[:start] + new + text[start + dropped :]
    (tmp_path / "p.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_is_refused(tmp_path / "p.yaml")


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@QUICK
def test_a_random_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "p.yaml").write_bytes(raw)
    loads_or_is_refused(tmp_path / "p.yaml")


@given(st.text(max_size=30) | st.tuples(st.sampled_from([*keys_of(RunSpec), "env.A", "verl.a"]), TEXT).map("=".join))
@QUICK
def test_a_random_assignment(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(BASE)
    loads_or_is_refused(tmp_path / "p.yaml", text)
