"""What each part of a spec becomes for verl, how values are written for Hydra, and how overrides are grouped for
people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashrl_cli import contract
from flashrl_cli.config import presets
from flashrl_cli.config.diagnose import keys_of
from flashrl_cli.config.layers import DEFAULT, Origin
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import Location
from flashrl_cli.precision import PRECISIONS
from flashrl_cli.verl.overrides import ENGINE, ROLLOUT, TABLE, Override, Places, by_theme, overrides, quote
from tests.specs import load_spec

EXTENSION = f"{ENGINE}.worker_extension_cls"


def values(preset: str, *, resume_from: Path | None = None, **options: Any) -> dict[str, Any]:
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"), resume_from=resume_from)
    return {("+" if o.added else "") + o.key: o.value for o in overrides(load_spec(preset, **options), places)}


def test_every_field_is_in_the_table_or_handled_apart():
    apart = {"name", "description", "rollout.precision", "resources.platform", "env", "verl", "algorithm.loss"}
    apart |= {key for key in keys_of(RunSpec) if key.startswith("correction.")} - {"correction.keep_responses"}
    apart |= {"model.attention", "rollout.kv_cache", "rollout.profile", "rollout.mix", "rollout.lm_head_fp32"}
    apart |= {"rollout.rotation", "data.shares", "trainer.mode", "trainer.prefetch"}
    apart |= {key for key in keys_of(RunSpec) if key.startswith("reward.")} - {
        *("reward.manager", "reward.overlong.buffer_len", "reward.overlong.penalty_factor", "reward.overlong.log")
    }
    own = ("watch.", "resources.gpu_memory_gib", "correction.keep_responses", "trainer.keep_samples")
    for_verl = {key for key in keys_of(RunSpec) if not key.startswith(own)}
    assert {entry.field for entry in TABLE} | apart == for_verl
    assert len({entry.key for entry in TABLE}) == len(TABLE)


@pytest.mark.parametrize(
    ("precision", "quantization", "extension"),
    [
        ("bf16", {}, contract.CHECKED_EXTENSION),
        ("fp8", {f"+{ENGINE}.quantization": "flashrl_fp8"}, contract.WORKER_EXTENSION),
        ("fp8-block", {f"{ROLLOUT}.quantization": "fp8"}, contract.CHECKED_EXTENSION),
        ("int8", {f"+{ENGINE}.quantization": "flashrl_int8"}, contract.WORKER_EXTENSION),
    ],
)
def test_precision_on_gpus_leaves_verls_own_path_alone_but_for_flashrls_methods(precision, quantization, extension):
    found = values("dapo-32b", rollout=precision)
    assert {key: value for key, value in found.items() if key.endswith(".quantization")} == quantization
    assert found[f"+{EXTENSION}"] == extension


@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_cpu_every_precision_refits_through_the_extension(precision):
    found = values("tiny", rollout=precision)
    assert found[f"+{EXTENSION}"] == contract.WORKER_EXTENSION
    assert found["trainer.device"] == "cpu"


def test_tis_and_its_absence():
    correction = "algorithm.rollout_correction"
    off = values("tiny", tis="off")
    assert {k: v for k, v in off.items() if k.startswith(correction)} == {f"{correction}.rollout_is": None}
    on = values("tiny", tis="3")
    assert (on[f"{correction}.rollout_is"], on[f"{correction}.rollout_is_threshold"]) == ("token", 3.0)
    assert on[f"{correction}.bypass_mode"] is False
    assert on[f"{ROLLOUT}.calculate_log_probs"] is True


MODE = f"{ROLLOUT}.logprobs_mode"


@pytest.mark.parametrize(
    ("sets", "mode"),
    [
        ([], "processed_logprobs"),
        (["rollout.top_k=0"], "processed_logprobs"),
        (["rollout.top_p=0.9"], "raw_logprobs"),
        (["rollout.top_k=20"], "raw_logprobs"),
        (["rollout.top_k=20", "rollout.temperature=0.7"], "processed_logprobs"),
        (["rollout.top_k=20", "correction.support=kept"], "processed_logprobs"),
    ],
)
def test_log_probs_of_truncated_rollouts_are_raw_unless_the_trainers_are_truncated_too(sets, mode):
    assert values("tiny", tis="2", sets=sets)[MODE] == mode
    assert MODE not in values("tiny", tis="off", sets=sets)


def test_kept_tokens_come_with_the_log_probs_and_by_verls_hook():
    sets = ["rollout.top_k=20", "correction.support=kept"]
    hook, most = "actor_rollout_ref.model.external_lib", f"+{ENGINE}.max_logprobs"
    found = values("tiny", tis="2", sets=sets)
    assert (found[hook], found[most]) == ("flashrl_cli.plugins.support", 256)
    assert not {hook, most} & values("tiny", tis="2", sets=sets[:1]).keys()
    assert values("tiny", tis="2", sets=[*sets, f"verl.{most}=300"])[most] == 300


def test_untouched_defaults_are_not_emitted():
    found = values("tiny")
    assert f"{ROLLOUT}.top_p" not in found
    assert values("tiny", sets=["rollout.top_p=1.0"])[f"{ROLLOUT}.top_p"] == 1.0


def test_critic_keys_only_where_there_is_a_critic():
    sets = ["critic.lr=1e-4", "critic.path=/c", "critic.max_tokens_per_gpu=9"]
    assert "critic.optim.lr" not in values("tiny", sets=sets)
    found = values("gsm8k-tiny-cpu", sets=sets)
    assert (found["critic.optim.lr"], found["critic.model.path"]) == (1e-4, "/c")
    assert found["+critic.ppo_infer_max_token_len_per_gpu"] == 9


def test_the_tiny_critic_starts_from_the_tiny_policy():
    found = values("gsm8k-tiny-cpu")
    assert found["critic.model.path"] == found["actor_rollout_ref.model.path"] == "/data/tiny/model"


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("prepared:other", "/data/other/model"),
        ("/models/x/", "/models/x"),
        ("./models/x", "{cwd}/models/x"),
        ("~/x", "{home}/x"),
    ],
)
def test_model_paths(path, absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = values("tiny", sets=[f"model.path={path}"])["actor_rollout_ref.model.path"]
    assert found == absolute.format(cwd=tmp_path, home=Path.home())


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("gsm8k", "/data/gsm8k/train.parquet", "/data/gsm8k/test.parquet"),
        ("x.parquet", "{cwd}/x.parquet", "{cwd}/x.parquet"),
        ("sub/x", "{cwd}/sub/x", "{cwd}/sub/x"),
        ("/d/x.jsonl", "/d/x.jsonl", "/d/x.jsonl"),
    ],
)
def test_data_paths(name, train, val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = values("tiny", sets=[f"data.train={name}", f"data.val={name}"])
    expected = [text.format(cwd=tmp_path) for text in (train, val)]
    assert [found["data.train_files"], found["data.val_files"]] == expected


def test_several_data_sets_bring_the_class_that_mixes_them():
    found = values("tiny", sets=["data.train=[gsm8k,/d/x.jsonl]", "data.val=[math]", "data.shares=[3,1]"])
    assert found["data.train_files"] == ["/data/gsm8k/train.parquet", "/d/x.jsonl"]
    assert found["data.val_files"] == ["/data/math/test.parquet"]
    assert (found["data.custom_cls.path"], found["data.custom_cls.name"]) == contract.MIXTURE
    assert found["+data.flashrl_shares"] == (3, 1)
    assert not {"data.custom_cls.path", "+data.flashrl_shares"} & set(values("tiny"))
    own = values("tiny", sets=["data.train=[a,b]", "verl.data.custom_cls.path=/mine.py"])
    assert own["data.custom_cls.path"] == "/mine.py"


def test_resume():
    assert values("tiny")["trainer.resume_mode"] == "auto"
    found = values("tiny", resume_from=Path("/ckpt/old/global_step_5"))
    assert (found["trainer.resume_mode"], found["trainer.resume_from_path"]) == (
        "resume_path",
        "/ckpt/old/global_step_5",
    )


def test_overlong_penalty_has_all_five_keys():
    found = values("dapo-32b", sets=["data.max_response_length=8192"])
    kwargs = {key.rpartition(".")[2]: v for key, v in found.items() if key.startswith("+reward.reward_kwargs")}
    assert kwargs == {"enable": True, "len": 4096, "penalty_factor": 1.0, "log": False, "max_resp_len": 8192}
    assert not any("reward_kwargs" in key for key in values("dapo-32b", sets=["reward.overlong=null"]))


def test_verbatim_keys_keep_their_plus_and_origin():
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))
    found = overrides(load_spec("tiny", sets=["verl.+a.b=[1, x y]", "verl.c.d=1e-3"]), places)
    assert [str(override) for override in found[-2:]] == ["+a.b=[1,'x y']", "c.d=0.001"]
    assert found[-1].origin == Origin("set", Location("--set", key="verl.c.d"))


def test_every_override_has_an_origin():
    places = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))
    found = {o.key: o.origin for o in overrides(load_spec("gsm8k-tiny-cpu", tis="2"), places)}
    assert str(found["trainer.total_training_steps"]).startswith("presets/gsm8k-tiny-cpu.yaml:")
    assert str(found["critic.strategy"]).startswith("presets/base/cpu.yaml:")
    assert found["algorithm.rollout_correction.rollout_is"] == Origin("option", Location("--tis"))
    assert found[f"{ROLLOUT}.max_model_len"].layer == "derived"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.text("'\\\"=,[]{}$: \n~", max_size=6)
)


def parsed(text: str) -> object:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"key={text}").value()


@given(SCALARS | st.lists(SCALARS, max_size=4))
@example("\\")
@example("\\'")
@example("a'b\\\\'")
@example("1_2")
@example("nan")
@example("/path with space/x,y=z'q")
@example("${a.b}")
@example(["a]b", "", None])
def test_hydra_reads_it_back(value):
    found = parsed(quote(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-6, "1e-6"),
        (1e-10, "1e-10"),
        (2.0, "2.0"),
        (1e22, "1e+22"),
        (True, "True"),
        (None, "null"),
        (["console", "file"], "[console,file]"),
        (("a b",), "['a b']"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("/a/b.parquet", "/a/b.parquet"),
        ("token-mean", "token-mean"),
        ("~/x", "'~/x'"),
        ("NULL", "'NULL'"),
        ("", "''"),
        ("it's", "'it\\'s'"),
    ],
)
def test_texts_that_people_read(value, text):
    assert quote(value) == text


PLACES = Places(name="run", data=Path("/data"), checkpoints=Path("/ckpt/run"))


def test_every_override_has_one_theme():
    for name in presets.names():
        given = overrides(load_spec(name, tis="2"), PLACES)
        grouped = by_theme(given)
        assert sorted(map(str, given)) == sorted(str(o) for group in grouped.values() for o in group)
        assert all(grouped.values())


def test_the_most_particular_theme_has_a_key():
    keys = [
        "ray_kwargs.ray_init.num_cpus",
        "reward.num_workers",
        "reward_model.enable",
        "algorithm.rollout_correction.rollout_is",
        "algorithm.adv_estimator",
        "actor_rollout_ref.rollout.logprobs_mode",
        "actor_rollout_ref.rollout.n",
        "data.val_files",
    ]
    grouped = by_theme([Override(key, 1, DEFAULT) for key in keys])
    assert {theme: [o.key for o in group] for theme, group in grouped.items()} == {
        "data": ["data.val_files"],
        "importance sampling": ["algorithm.rollout_correction.rollout_is", "actor_rollout_ref.rollout.logprobs_mode"],
        "algorithm": ["algorithm.adv_estimator"],
        "rollout": ["actor_rollout_ref.rollout.n"],
        "reward": ["reward.num_workers"],
        "machine": ["ray_kwargs.ray_init.num_cpus", "reward_model.enable"],
    }
