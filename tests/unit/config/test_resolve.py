"""From preset and options to a spec: values, origins, and every mistake with its place and hint."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from flashrl_cli.config.layers import Origin
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.errors import InputError, Problem

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
    assert origins["algorithm.lr"].where.endswith("mine.yaml:3")
    assert origins["rollout.n"] == Origin("set", "--set rollout.n")
    assert origins["rollout.precision"] == Origin("option", "--rollout")
    assert origins["correction.cap"] == Origin("option", "--tis")
    assert origins["rollout.top_p"] == Origin("default")
    assert origins["verl.trainer.x.y"].where.endswith("mine.yaml:7")
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


def test_what_is_set_is_not_derived(preset):
    sets = ["algorithm.advantage=gae", "critic.path=/c", "critic.max_tokens_per_gpu=9", "rollout.max_model_len=200"]
    spec = load_spec(preset(), sets=sets).spec
    assert (spec.critic.path, spec.critic.max_tokens_per_gpu, spec.rollout.max_model_len) == ("/c", 9, 200)


@pytest.mark.parametrize(("text", "cap"), [("off", None), ("2", 2.0), ("1.5", 1.5), ("8.0", 8.0)])
def test_tis(preset, text, cap):
    assert load_spec(preset("correction: {cap: 3}\n"), tis=text).spec.correction.cap == cap


@pytest.mark.parametrize("text", ["two", "-1", "0", "true", "", "[2]", ".inf", "null"])
def test_bad_tis(preset, text):
    (problem,) = problems(preset(), tis=text)
    assert (problem.where, problem.hint) == ("--tis", "--tis takes a cap above 0, or off")


def test_bad_precision(preset):
    (problem,) = problems(preset(), rollout="int4")
    assert problem.where == "--rollout"
    assert "'bf16', 'fp8', 'fp8-block' or 'int8'" in problem.message


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("algorithm.rollout_iz=token", "--set algorithm.rollout_iz", "keys of algorithm are advantage, "),
        ("foo.bar=2", "--set foo.bar", "keys of a preset are name, "),
        ("lr=1e-5", "--set lr", "did you mean algorithm.lr or critic.lr?"),
        ("data.trian=x", "--set data.trian", "data.train?"),
        ("rollouts.n=2", "--set rollouts.n", "rollout.n?"),
        ("reward_model.reward_manager=dapo", "--set reward_model.reward_manager", "reward.manager"),
        ("foo={a: 1}", "--set foo", "keys of a preset are"),
        ("extends=tiny", "--set extends", "stands at the top of a preset's file"),
        ("novalue", "--set novalue", "--set algorithm.lr=1e-6"),
        ("=3", "--set =3", "--set algorithm.lr=1e-6"),
        ("data..train=3", "--set data..train=3", "--set data.train=…"),
        ("data.train", "--set data.train", "--set data.train=…"),
        ("data.train: x", "--set data.train: x", "--set data.train=x"),
        ("model.path=@x", "--set model.path", "quote it"),
        ("trainer.logger=[a", "--set trainer.logger", "close the bracket"),
        ("trainer.steps=None", "--set trainer.steps", "write null"),
    ],
)
def test_bad_set(preset, text, where, hint):
    (problem,) = problems(preset(), sets=[text])
    assert problem.where == where
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rollout.n=many", "rollout.n = many: should be a whole number"),
        ("rollout.n=1.5", "rollout.n = 1.5: should be a whole number"),
        ("rollout.n=true", "rollout.n = true: should be a whole number"),
        ("rollout.n=0", "rollout.n = 0: should be greater than 0"),
        ("rollout.top_p=1.1", "should be less than or equal to 1"),
        ("algorithm.lr='1e-6'", 'algorithm.lr = "1e-6": should be a number'),
        ("algorithm.lr=.nan", "should be a finite number"),
        ("algorithm.kl_loss=yes", "algorithm.kl_loss = yes: should be true or false"),
        ("data=3", "data = 3: should be a map of keys"),
        ("data=[a]", "data = [a]: should be a map of keys"),
        ("data.train=[a]", "data.train = [a]: should be text"),
        ("data.train=", "data.train = null: should be text"),
        ("trainer.logger=wandb", "trainer.logger = wandb: should be a list"),
        ("algorithm.advantage=ppo", "should be one of 'gae' or 'grpo'"),
        ("verl.a.b=[[1]]", "should be a value or a list of values"),
        ("trainer.project=a/b", "trainer.project = a/b: should be the name of a folder"),
        ("trainer.project=..", "should be the name of a folder"),
        ("trainer.logger=[1]", "trainer.logger.0 = 1: should be text"),
        ("model.path=''", 'model.path = "": should be text that is not empty'),
        (f"model.path=[{'x' * 80}]", "model.path = [" + "x" * 58 + "…: should be text"),
    ],
)
def test_bad_values(preset, text, part):
    (problem,) = problems(preset(), sets=[text])
    assert part in problem.message
    assert (problem.where or "").startswith("--set ")


def test_everything_wrong_is_told_at_once(preset):
    path = preset("critic: {lr: 1, lr: 2}\nfoo: {a: 1}\nreward: [dapo]\n", base=BASE.replace("64", "many"))
    found = problems(path, rollout="int4", tis="two", sets=["rollout.m=3", "what"])
    places = [(problem.where or "").rsplit("/", 1)[-1] for problem in found]
    assert places == [
        "mine.yaml:2",
        "mine.yaml:6",
        "mine.yaml:7",
        "mine.yaml:8",
        "--rollout",
        "--tis",
        "--set rollout.m",
        "--set what",
    ]


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
def test_a_misspelled_key_is_not_told_as_missing_too(preset, written):
    (problem,) = problems(preset(base=BASE.replace("lr: 1e-6", written)))
    assert problem.message.startswith("unknown key algorithm.")
    assert problem.hint == "did you mean algorithm.lr?"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rollout.n=8.0", "rollout.n=8"),
        ('rollout.n="8"', "rollout.n=8"),
        ("data.train_batch_size=1_024", "data.train_batch_size=1024"),
        ("data.train_batch_size=1,024", "data.train_batch_size=1024"),
        ("algorithm.lr=1e-6,", "algorithm.lr=1e-6"),
        ("algorithm.lr=0,5", "algorithm.lr=0.5"),
        ("algorithm.lr=[1e-6]", "algorithm.lr=1e-6"),
        ("rollout.gpu_memory_utilization=80%", "rollout.gpu_memory_utilization=0.8"),
        ("algorithm.kl_loss=yes", "algorithm.kl_loss=true"),
        ("algorithm.kl_loss=off", "algorithm.kl_loss=false"),
        ("algorithm.kl_loss=1", "algorithm.kl_loss=true"),
        ("trainer.steps=none", "trainer.steps=null"),
        ("algorithm.advantage=GRPO", "algorithm.advantage=grpo"),
        ("rollout.precision=int8-w8a8", "rollout.precision=int8"),
        ("trainer.logger=wandb", "'trainer.logger=[console, file, wandb]'"),
        ("trainer.logger=wandb,file", "'trainer.logger=[console, file, wandb]'"),
        ("description=3", "'description=\"3\"'"),
    ],
)
def test_the_value_that_was_meant(preset, text, hint):
    (problem,) = problems(preset(), sets=[text])
    assert problem.hint == f"did you mean --set {hint}?"


def test_the_value_that_was_meant_is_told_as_it_was_written(preset):
    assert problems(preset(), rollout="INT8")[0].hint == "did you mean --rollout int8?"
    assert problems(preset(base=BASE.replace("n: 8", "n: 8.0")))[0].hint == "did you mean n: 8?"


@pytest.mark.parametrize(
    "text", ["rollout.n=many", "rollout.n=-4", "rollout.n=0", "algorithm.lr=nan", "rollout.top_p=2"]
)
def test_no_guess_where_none_would_fit(preset, text):
    assert problems(preset(), sets=[text])[0].hint is None


def test_a_value_over_a_part_is_told_though_another_layer_covers_it(preset):
    found = problems(preset(), sets=["rollout=8", "rollout.n=4", "algorithm=null"])
    assert [(p.where, p.message) for p in found] == [
        ("--set rollout", "rollout = 8: should be a map of keys"),
        ("--set algorithm", "algorithm = null: should be a map of keys"),
    ]


def test_maps_may_be_set_as_a_whole(preset):
    spec = load_spec(preset(), sets=["rollout={n: 4, top_p: 0.9}", "env={A: 1}"]).spec
    assert (spec.rollout.n, spec.rollout.top_p, spec.env) == (4, 0.9, {"A": "1"})


def test_a_space_around_the_equals_sign(preset):
    assert load_spec(preset(), sets=["algorithm.lr = 1e-5"]).spec.algorithm.lr == 1e-5


def test_environment_values_are_the_text_that_was_written(preset):
    path = preset("env: {A: 010, B: 1e-6, C: true, D: '1', E: x}\n")
    env = load_spec(path, sets=["env.F=0x10", "env.G=off"]).spec.env
    assert env == {"A": "010", "B": "1e-6", "C": "true", "D": "1", "E": "x", "F": "0x10", "G": "off"}


def test_nested_keys_of_verl_are_written_out(preset):
    found = problems(preset("verl:\n  trainer: {x: 1, y: {z: a b}}\n"))
    assert [(p.where or "")[-2:] for p in found] == [":7"]
    assert found[0].hint == "write `trainer.x: 1`, `trainer.y.z: a b`"


def test_keys_of_another_program_are_translated(preset):
    found = problems(preset("other: {x: 1}\n"), sets=["foo=1"], translate={"other.x": "it is rollout.n"}.get)
    assert [p.hint for p in found] == ["it is rollout.n", found[1].hint]
    assert (found[1].hint or "").startswith("keys of a preset are")


def test_an_unreadable_file_is_not_blamed_for_missing_keys(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [")
    (problem,) = problems(str(tmp_path / "broken.yaml"))
    assert "not YAML" in problem.message


def test_rules_are_told_with_their_place(preset):
    (problem,) = problems(preset(), sets=["algorithm.mini_batch_size=30"])
    assert problem == Problem(
        "algorithm.mini_batch_size: 30 does not divide data.train_batch_size = 64",
        "--set algorithm.mini_batch_size",
        "--set algorithm.mini_batch_size=16",
    )


def test_an_override_of_a_part_that_is_null(preset):
    path = preset("reward: {manager: dapo, overlong: {buffer_len: 8}}\n")
    assert load_spec(path, sets=["reward.overlong=null"]).spec.reward.overlong is None


def test_an_unknown_map_is_told_key_by_key(preset):
    found = problems(preset("reward_model:\n  reward_manager: dapo\n  overlong: {enable: true}\nfoo: {}\n"))
    assert [p.message for p in found] == [
        "unknown key reward_model.reward_manager",
        "unknown key reward_model.overlong.enable",
        "unknown key foo",
    ]
    assert [(p.where or "")[-2:] for p in found[:2]] == [":7", ":8"]
