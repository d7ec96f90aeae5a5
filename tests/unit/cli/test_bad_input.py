"""Bad input as people type it: exit 2, what and where and the fix on stderr, nothing on stdout, nothing written.

Keys of verl's that its tree judges need verl's wheel and Hydra, and import no torch. What a unit test of the
configuration refuses is not repeated here; input at random is in tests/unit/config/test_resolve.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from flashrl_cli.cli.app import main
from flashrl_cli.precision import PRECISIONS, joined

BASE = """\
model: {path: Qwen/Qwen3-0.6B}
data: {train: gsm8k, val: gsm8k, train_batch_size: 64, max_prompt_length: 100, max_response_length: 28}
algorithm: {advantage: grpo, lr: 1e-6, micro_batch_size_per_gpu: 8, mini_batch_size: 32}
rollout: {log_prob_micro_batch_size_per_gpu: 8, n: 8}
trainer: {project: p}
"""
ROLLOUT = "{log_prob_micro_batch_size_per_gpu: 8, n: 8}"
DRY = ("train", "--dry-run", "--preset")
ONE_OF = f"should be one of {joined(map(repr, sorted(PRECISIONS)), 'or')}"


class Said(NamedTuple):
    """What a command ended with."""

    code: int
    stdout: str
    stderr: str


Run = Callable[..., Said]


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with size and time of change; links are not followed."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(root.rglob("*"))}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `flashrl WORDS` in this process, in a folder that holds p.yaml alone; asserts that nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(BASE)

    def call(*words: str) -> Said:
        before = tree(tmp_path)
        monkeypatch.setattr(sys, "argv", ["flashrl", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert tree(tmp_path) == before
        return Said(int(caught.value.code or 0), *capfd.readouterr())

    return call


def assert_refused(said: Said, *parts: str) -> None:
    assert said.code == 2, said.stderr
    assert said.stdout == ""
    assert "Traceback" not in said.stderr
    assert not [part for part in parts if part not in said.stderr], said.stderr


SETS = [
    ("algorithm.rollout_is=token", "--set algorithm.rollout_is: unknown key", "correction.cap, or --tis CAP"),
    ("actor_rollout_ref.actor.imp_ratio_cap=2", "unknown key", "was a fork's key", "correction.cap, or --tis CAP"),
    ("reward_model.reward_manager=dapo", "unknown key", "use reward.manager"),
    ("actor_rollout_ref.actor.optim.lr=1e-6", "unknown key", "--set algorithm.lr=…"),
    ("actor_rollout_ref.rollout.n=8", "--set rollout.n=…"),
    ("actor_rollout_ref.rollout.tensor_model_parallel_size=2", "--set rollout.tensor_parallel=…"),
    ("trainer.n_gpus_per_node=8", "--set resources.gpus_per_node=…"),
    ("trainer.nnodes=2", "--set resources.nodes=…"),
    ("trainer.total_epochs=3", "--set trainer.epochs=…"),
    ("trainer.test_freq=5", "--set trainer.validate_every=…"),
    ("trainer.resume_mode=auto", "--resume"),
    ("trainer.experiment_name=x", "--name"),
    ("data.train_files=/x.parquet", "--set data.train=…"),
    ("algorithm.adv_estimator=grpo", "--set algorithm.advantage=…"),
    ("++actor_rollout_ref.actor.optim.lr=1e-6", "--set algorithm.lr=…"),
    ("lr=1e-6", "did you mean algorithm.lr or critic.lr?"),
    ("n=4", "did you mean rollout.n?"),
    ("gpus_per_node=8", "did you mean resources.gpus_per_node?"),
    ("algorithm.LR=1e-6", "did you mean algorithm.lr?"),
    ("Algorithm.lr=1e-6", "did you mean algorithm.lr?"),
    ("algorithm/lr=1e-6", "did you mean algorithm.lr?"),
    ("--algorithm.lr=1e-6", "did you mean algorithm.lr?"),
    ("“algorithm.lr”=1e-6", "did you mean algorithm.lr?"),
    ("data.train-batch-size=4", "did you mean data.train_batch_size?"),
    ("resources.gpus=8", "did you mean resources.gpus_per_node or resources.rollout_gpus_per_node?"),
    ("algorithm.learning_rate=1", "keys of algorithm are advantage, normalize_by_std, loss, lr, "),
    ("rollout.tp=2", "keys of rollout are precision, kv_cache, ", "tensor_parallel"),
    ("data.trian=x", "did you mean data.train?"),
    ("rollouts.n=2", "did you mean rollout.n?"),
    ("foo={a: 1}", "--set foo: unknown key foo.a"),
    ("a=b=c", "unknown key a", "keys of a preset are name, "),
    ("extends=tiny", "extends belongs at the top of a preset's file"),
    ("algorithm.lr", "not of the form key=value", "hint: --set algorithm.lr=…"),
    ("algorithm.lr:1e-6", "not of the form key=value", "hint: --set algorithm.lr=1e-6"),
    ("algorithm.lr: 1e-6", "--set algorithm.lr: 1e-6: not of", "hint: --set algorithm.lr=1e-6"),
    ("=5", "--set =5: not of the form key=value", "hint: --set algorithm.lr=1e-6"),
    ("", "not of the form key=value"),
    ("algorithm.lr.=1", "'algorithm.lr.' is no key", "hint: --set algorithm.lr=…"),
    ("algorithm..lr=1", "'algorithm..lr' is no key"),
    ("verl.=3", "'verl.' is no key"),
    ("algorithm.lr\u200b=1", "holds a character that nobody sees"),
    ("data=[a]", "data = [a]: should be a map of keys"),
    ("algorithm=null", "algorithm = null: should be a map of keys"),
    ("algorithm=grpo", "algorithm = grpo: should be a map of keys", "--set algorithm.KEY=… takes one of its keys: adv"),
    ("verl=3", "should be a map of keys", "--set verl.KEY=…"),
    ("env=A", "should be a map of keys", "--set env.KEY=…"),
    ("env={A: [1]}", "should be text"),
    ("env={A: }", "env.A = null: should be text"),
    ("verl.a={b: {c: 1}}", "write deeper keys dotted", "hint: write `a.b.c: 1`"),
    ("verl.a=[[1]]", "should be a value or a list of values"),
    ("rollout.n=8.0", "should be a whole number", "did you mean --set rollout.n=8?"),
    ("rollout.n=many", "rollout.n = many: should be a whole number"),
    ("rollout.n=true", "rollout.n = true: should be a whole number"),
    ('rollout.n="8"', 'rollout.n = "8": should be a whole number', "did you mean --set rollout.n=8?"),
    ("data.train_batch_size=1_024", "did you mean --set data.train_batch_size=1024?"),
    ("data.train_batch_size=1,024", "did you mean --set data.train_batch_size=1024?"),
    ("data.train_batch_size=5e2", "did you mean --set data.train_batch_size=500?"),
    ("algorithm.lr=1e-6,", "should be a number", "did you mean --set algorithm.lr=1e-6?"),
    ("algorithm.lr=0,5", "did you mean --set algorithm.lr=0.5?"),
    ("algorithm.lr=[1e-6]", "did you mean --set algorithm.lr=1e-6?"),
    ("algorithm.lr='1e-6'", 'algorithm.lr = "1e-6": should be a number'),
    ("algorithm.lr=1e-6 algorithm.clip_low=0.3", "should be a number"),
    ("algorithm.lr=nan", "should be a number"),
    ("algorithm.lr=.nan", "should be a finite number"),
    ("algorithm.lr=.inf", "should be a finite number"),
    ("algorithm.lr=1e400", "should be a finite number"),
    ("algorithm.lr=-1e-6", "should be greater than 0"),
    ("rollout.n=-4", "should be greater than 0"),
    ("rollout.n=0", "rollout.n = 0: should be greater than 0"),
    ("rollout.gpu_memory_utilization=80%", "did you mean --set rollout.gpu_memory_utilization=0.8?"),
    ("rollout.gpu_memory_utilization=80", "should be less than or equal to 1"),
    ("algorithm.kl_loss=yes", "should be true or false", "did you mean --set algorithm.kl_loss=true?"),
    ("algorithm.kl_loss=off", "did you mean --set algorithm.kl_loss=false?"),
    ("algorithm.kl_loss=1", "did you mean --set algorithm.kl_loss=true?"),
    ("trainer.steps=None", "None is Python's", "write null"),
    ("trainer.steps=none", "did you mean --set trainer.steps=null?"),
    ("trainer.logger=wandb", "should be a list", "did you mean --set 'trainer.logger=[console, file, wandb]'?"),
    ("trainer.logger=wandb,file", "did you mean --set 'trainer.logger=[console, file, wandb]'?"),
    ("trainer.logger=[console,wandb]", "lacks file", "[console,wandb,file]"),
    ("trainer.logger=[1]", "--set trainer.logger: trainer.logger.0 = 1: should be text"),
    ("trainer.logger=[a", "close the bracket"),
    ("model.path=", "model.path = null: should be text"),
    ('model.path=""', "should be text that is not empty"),
    ("model.path=@x", "quote it", "--set 'model.path=\"@x\"'"),
    ("model.path=*x", "aliases (*x) are not supported"),
    ("model.path=!!python/object:os.system x", "tag !!python/object:os.system is not supported"),
    ("algorithm.advantage=“grpo”", "typographic quotes", 'write "grpo"'),
    ("algorithm.advantage=GRPO", "did you mean --set algorithm.advantage=grpo?"),
    ("algorithm.advantage=ppo", "should be one of 'gae'", "did you mean --set algorithm.advantage=gae?"),
    ("algorithm.advantage=reinforce_plus_plus", "did you mean --set algorithm.advantage=reinforce-plus-plus?"),
    ("algorithm.advantage=REINFORCE++", "did you mean --set algorithm.advantage=reinforce-plus-plus?"),
    ("algorithm.advantage=dr_grpo", "--set algorithm.advantage=grpo --set algorithm.normalize_by_std=false"),
    ("algorithm.advantage=remax", "verl's V1 trainer does not give it the reward of a greedy response"),
    ("algorithm.advantage=gdpo", "verl's V1 trainer does not give it the components of the reward"),
    ("algorithm.advantage=optimal_token_baseline", "does not give it the sum of squared probabilities"),
    ("algorithm.advantage=tir_optimal_token_baseline", "does not give it the sum of squared probabilities"),
    ("trainer.mode=async", "separate_async samples on GPUs of its own, colocate_async on the trainer's"),
    ("trainer.mode=one_step_off_policy", "did you mean --set trainer.mode=separate_async?"),
    ("trainer.mode=colocate", "did you mean --set trainer.mode=colocate_async?"),
    ("algorithm.loss=vanilla", "did you mean --set algorithm.loss=ppo?"),
    ("algorithm.loss=geo_mean", "did you mean --set algorithm.loss=gmpo?"),
    ("algorithm.loss=dppo_tv", "did you mean --set algorithm.loss=dppo-tv?"),
    ("correction.kind=token_truncate", "did you mean --set correction.kind=tis?"),
    ("correction.kind=truncated", "did you mean --set correction.kind=tis?"),
    ("correction.kind=token_mask", "did you mean --set correction.kind=icepop?"),
    ("correction.kind=mis", "did you mean --set correction.kind=icepop?"),
    ("correction.kind=IcePop", "did you mean --set correction.kind=icepop?"),
    ("correction.kind=sequence", "did you mean --set correction.kind=seq-tis?"),
    ("correction.kind=sequence_truncate", "did you mean --set correction.kind=seq-tis?"),
    ("correction.kind=sequence_mask", "--set correction.reject.by=seq-sum --set correction.reject.upper=…"),
    ("correction.kind=seq-mask-tis", "--set correction.reject.by=seq-mean --set correction.reject.upper=…"),
    ("correction.kind=off", "did you mean --set correction.kind=none?"),
    ("correction.lower=0", "correction.lower = 0: should be greater than 0"),
    ("correction.reject=token", "should be a map of keys", "by, estimator, lower, upper"),
    ("algorithm.loss_aggregation=token_mean", "did you mean --set algorithm.loss_aggregation=token-mean?"),
    ("rollout.precision=int8-w8a8", "did you mean --set rollout.precision=int8?"),
    ("rollout.precision=int3", ONE_OF),
    ("correction.cap=off", "should be a number", "--tis takes a cap above 0, or off"),
    ("description=3", "should be text", "did you mean --set 'description=\"3\"'?"),
    ("name=a/b", "should be the name of a folder"),
    ("trainer.project=..", "trainer.project = ..: should be the name of a folder"),
    ("data.train=[a,1]", "data.train.1 = 1: should be text"),
    ("data.train=1", "data.train = 1: should be text or a list"),
    ("algorithm.max_tokens_per_gpu=x", "algorithm.max_tokens_per_gpu = x: should be 'auto' or a whole number"),
    (f"model.path=[{'x' * 80}]", f"model.path = [{'x' * 58}…: should be text"),
]


@pytest.mark.parametrize(("text", "parts"), [(s[0], s[1:]) for s in SETS])
def test_sets(run: Run, text: str, parts: tuple[str, ...]) -> None:
    assert_refused(run(*DRY, "p.yaml", "--set", text), "error: preset p.yaml: 1 problem\n", *parts)


OPTIONS = [
    (("--tis", "two"), "--tis: correction.cap = two: should be a number", "hint: --tis takes a cap above 0, or off"),
    *[
        (("--tis", text), "--tis: correction.cap = ", "hint: --tis takes a cap above 0, or off")
        for text in ("-1", "0", "none", "nan", ".nan", "inf", "1e400", "", "OFF", "2x", "2,5", "[2]", "true", "null")
    ],
    (("--rollout", "int3"), ONE_OF),
    (("--rollout", "INT8"), "hint: did you mean --rollout int8?"),
    (("--rollout", "int8-w8a8"), "hint: did you mean --rollout int8?"),
    (("--rollout", "fp16"), "should be one of", "hint: did you mean --rollout bf16?"),
    (("--rollout", "w8a8"), ONE_OF),
    (("--rollout", ""), 'rollout.precision = "": should be one of'),
    (("--resume", "yes"), "error: --resume yes: ", "--resume takes auto|never|PATH"),
    (("--name", "../x"), "error: --name ../x: "),
    (("--nope",), "No such option: --nope"),
    (("--set",), "requires an argument"),
    (("–-set", "algorithm.lr=1"), "unexpected extra argument"),
    (("-set", "algorithm.lr=1"), "No such option: -s"),
    (("--set", "algorithm.lr=1e-6", "algorithm.clip_low=0.1"), "unexpected extra argument"),
    (("--set", "algorithm.lr", "=", "1e-6"), "unexpected extra argument"),
    (("--json", "--tis", "two"), "should be a number"),
]


@pytest.mark.parametrize(("words", "parts"), [(o[0], o[1:]) for o in OPTIONS])
def test_options(run: Run, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(run(*DRY, "p.yaml", *words), *parts)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train",), "Missing option '--preset'"),
        (("train", "tiny"), "Missing option '--preset'"),
        (("presets", "shw"), "Did you mean 'show'?"),
        (("presets", "show"), "Missing argument"),
        (("presets", "show", "dapo32b"), "did you mean dapo-32b?"),
        (("presets", "show", "p.yaml", "--set", "trainer.nnodes=2"), "--set resources.nodes=…"),
        (("presets", "show", "p.yaml", "--rollout", "int3"), "should be one of"),
    ],
)
def test_commands(run: Run, words: tuple[str, ...], part: str) -> None:
    assert_refused(run(*words), part)


PRESETS = [
    ("dapo32b", "error: no preset named 'dapo32b'", "hint: did you mean dapo-32b?"),
    ("p", "no preset named 'p'", "for the file: p.yaml"),
    ("q.yaml", "no preset file q.yaml"),
    ("", "no preset named ''", "presets are: "),
    ("folder.yaml", "folder.yaml is a folder"),
    ("/dev/zero", "larger than 100,000 bytes"),
    ("/dev/null", "not set: model.path, data.train, "),
    ("base/cpu", "not set: model.path, data.train, "),
]


@pytest.mark.parametrize(("name", "parts"), [(p[0], p[1:]) for p in PRESETS])
def test_presets(run: Run, tmp_path: Path, name: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "folder.yaml").mkdir()
    said = run(*DRY, name)
    assert_refused(said._replace(stderr=said.stderr.lower()), *(part.lower() for part in parts))


FILES = {
    "a duplicate key": (BASE.replace("lr: 1e-6", "lr: 1e-6, lr: 2e-6"), "p.yaml:3: key 'algorithm.lr' is given twice"),
    "a tab": (f"{BASE}critic:\n\tlr: 1\n", "p.yaml:7: not YAML", "indent with spaces, not with tabs"),
    "a list for a map": (BASE.replace(ROLLOUT, "[n, 8]"), "p.yaml:4: rollout = [n, 8]: should be a map of keys"),
    "a list of maps": (BASE.replace(ROLLOUT, "[{n: 8}]"), "p.yaml:4: rollout = ", "write its keys below it: precis"),
    "an empty section": (f"{BASE}critic:\n", "p.yaml:6: critic = null", "drop the line, or write its keys below it"),
    "an empty verl": (f"{BASE}verl:\n", "p.yaml:6: verl = null", "drop the line"),
    "no space after the colon": (f"{BASE}critic:\n  lr:1e-6\n", "hint: a colon and a space: `lr: 1e-6`"),
    "an equals sign": (f"{BASE}critic:\n  lr = 1e-6\n", "hint: a colon and a space: `lr: 1e-6`"),
    "no space in a map": (BASE.replace("lr: 1e-6", "lr:1e-6"), "1 problem\n", "did you mean algorithm.lr?"),
    "capitals in a key": (BASE.replace("lr: 1e-6", "Lr: 1e-6"), "1 problem\n", "did you mean algorithm.lr?"),
    "a key that is nearly one": (BASE.replace("lr: 1e-6", "learn_lr: 1e-6"), "1 problem\n", "mean algorithm.lr?"),
    "an empty map": (f"{BASE}foo: {{}}\n", "unknown key foo\n"),
    "an open list": ("a: [", "1 problem\n", "p.yaml:1: not YAML"),
    "a dead map of verl's": (
        f"{BASE}reward_model:\n  reward_manager: dapo\n",
        "p.yaml:7: unknown key reward_model.reward_manager",
        "use reward.manager",
    ),
    "a map of verl's": (
        f"{BASE}actor_rollout_ref:\n  actor:\n    optim: {{lr: 1}}\n    imp_ratio_cap: 2\n  rollout: {{n: 8}}\n",
        "p.yaml: 3 problems",
        "p.yaml:8: unknown key actor_rollout_ref.actor.optim.lr",
        "--set algorithm.lr=…",
        "p.yaml:9: unknown key actor_rollout_ref.actor.imp_ratio_cap",
        "p.yaml:10: unknown key actor_rollout_ref.rollout.n",
    ),
    "a dotted key of verl's": (f"{BASE}trainer.nnodes: 2\n", "p.yaml:6: unknown key", "--set resources.nodes=…"),
    "a dotted key": (BASE.replace(f"rollout: {ROLLOUT}", "rollout.n: 8"), "p.yaml:4: ", "write `n:` below `rollout:`"),
    "nested keys under verl": (
        f"{BASE}verl:\n  trainer:\n    x: 1\n    y: {{z: a b}}\n",
        "p.yaml:8: verl.trainer = ",
        "write `trainer.x: 1`, `trainer.y.z: a b`",
    ),
    "a list under verl": (f"{BASE}verl: [trainer.x]\n", "p.yaml:6: verl = [trainer.x]: should be a map"),
    "a list under env": (f"{BASE}env: [A=1]\n", "p.yaml:6: env = [A=1]: should be a map"),
    "values under env": (f"{BASE}env:\n  A: {{b: 1}}\n  B: [1]\n  C:\n", "p.yaml:7", "p.yaml:8", "env.C = null"),
    "extends nothing": (f"{BASE}extends:\n", "p.yaml:6: extends should be a list"),
    "Extends": (f"{BASE}Extends: base/cpu\n", "p.yaml:6: unknown key Extends", "did you mean extends?"),
    "Hydra's defaults": (f"{BASE}defaults: [ppo_trainer]\n", "p.yaml:6: unknown key defaults", "keys of a preset are"),
    "a shell script": ("#!/bin/sh\npython3 -m verl.trainer.main_ppo \\\n  a.b=grpo\n", "p.yaml:1: a preset is a map"),
    "nothing": ("", "error: preset p.yaml: 1 problem\n", "not set: model.path, data.train, "),
    "UTF-16": (BASE.encode("utf-16"), "p.yaml: not UTF-8 text", "save it as UTF-8"),
    "yes": (BASE.replace("lr: 1e-6", "lr: 1e-6, kl_loss: yes"), "p.yaml:3: ", "did you mean kl_loss: true?"),
    "dashes in a key": (BASE.replace("train_batch_size", "train-batch-size"), "1 problem\n", "data.train_batch_size?"),
    "a number as text": (BASE.replace("1e-6", "'1e-6'"), 'p.yaml:3: algorithm.lr = "1e-6": should be a', "lr: 1e-6?"),
    "a huge number": (BASE.replace("64", "9" * 5000), "p.yaml:2: '9999999999999999999999999999999999999999' is no int"),
    "a broken rule": (BASE.replace("32}", "30}"), "p.yaml:3: algorithm.mini_batch_size: 30 does not divide"),
}


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", FILES)
def test_files(run: Run, tmp_path: Path, case: str) -> None:
    content, *parts = FILES[case]
    write(tmp_path / "p.yaml", content)
    assert_refused(run(*DRY, "p.yaml"), *map(str, parts))


@pytest.mark.parametrize(
    "content",
    [
        BASE.replace("\n", "\r\n"),
        BASE.replace("\n", "\r"),
        b"\xef\xbb\xbf" + BASE.encode(),
        f"---\n{BASE}...\n",
        f"# café\n{BASE}",
        f"extends: [base/cpu, base/cpu]\n{BASE}",
    ],
    ids=["CRLF", "CR", "BOM", "document markers", "UTF-8", "a part twice"],
)
def test_accepted_files(run: Run, tmp_path: Path, content: str | bytes) -> None:
    write(tmp_path / "p.yaml", content)
    said = run("presets", "show", "p.yaml")
    assert (said.code, said.stderr) == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "algorithm.lr = 1e-5",
        "rollout={n: 4, top_p: 0.9}",
        "trainer.steps=null",
        "trainer.steps=",
        "algorithm.kl_loss=TRUE",
        "env.NCCL_DEBUG=INFO",
        "env.X=010",
        "trainer.logger=[console,file,wandb]",
        "model.path=a=b",
    ],
)
def test_accepted_sets(run: Run, text: str) -> None:
    assert run("presets", "show", "p.yaml", "--set", text).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").chmod(0)
    assert_refused(run(*DRY, "p.yaml"), "p.yaml: cannot be read: Permission denied")


def test_everything_at_once_in_order_and_nothing_twice(run: Run, tmp_path: Path) -> None:
    part = "rollout: {n: many}\ncritic: [x]\n"
    own = BASE.replace("64", "lots").replace(f"rollout: {ROLLOUT}\n", "").replace("grpo", "ppo")
    write(tmp_path / "part.yaml", part)
    write(tmp_path / "p.yaml", f"extends: ./part.yaml\n{own}verl:\n  a: {{b: 1}}\n  a: 2\nfoo: 1\n")
    said = run(*DRY, "p.yaml", "--rollout", "x", "--tis", "two", "--set", "m=2", "--set", "what", "--set", "data.val=3")
    assert_refused(said)
    first, *lines = [line.strip() for line in said.stderr.splitlines() if not line.strip().startswith("hint:")]
    assert first == "error: preset p.yaml: 12 problems"
    assert [line.split(": ")[0] for line in lines] == [
        "part.yaml:1",
        "part.yaml:2",
        "p.yaml:3",
        "p.yaml:4",
        "p.yaml:7",
        "p.yaml:8",
        "p.yaml:9",
        "--rollout",
        "--tis",
        "--set m",
        "--set what",
        "--set data.val",
    ]
    assert len(set(lines)) == len(lines)


with_verl = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
WITHOUT_PREFIX = [
    ("actor_rollout_ref.actor.use_dynamic_bsz=true", "--set algorithm.max_tokens_per_gpu=…"),
    ("trainer.val_only=true", "keys of verl's own go under verl: --set verl.trainer.val_only=…"),
    ("data.shuffle=false", "--set verl.data.shuffle=…"),
    ("+trainer.val_only=true", "--set verl.trainer.val_only=…"),
    ("+trainer.nothing=1", "--set verl.+trainer.nothing=… adds a key that verl's own tree lacks"),
    ("actor_rollout_ref.actor.optim.lrr=1", "did you mean verl's actor_rollout_ref.actor.optim.lr?"),
    ("actor_rollout_ref.actor.optim.lrr=1", "--set algorithm.lr=…"),
    ("actor_rollout_ref.actor.use_dynamic_bzs=1", "did you mean verl's actor_rollout_ref.actor.use_dynamic_bsz?"),
    ("actor_rollout_ref.actor.grad_clip=1", "verl.actor_rollout_ref.actor.optim.clip_grad"),
    ("nothing.at.all=1", "keys of a preset are name, "),
]
UNDER_VERL = [
    ("verl.actor_rollout_ref.actor.optim.lr=1", "--set algorithm.lr=…"),
    ("verl.actor_rollout_ref.actor.optim.lrr=1", "did you mean actor_rollout_ref.actor.optim.lr"),
    ("verl.actor_rollout_ref.actor.imp_ratio_cap=2", "--tis CAP"),
    ("verl.reward_model.reward_manager=dapo", "reward.manager"),
    ("verl.a.b=1", "verl has no key a.b"),
    ("verl.trainer.val_onlys=true", "did you mean trainer.val_only?"),
    ("verl.+trainer.val_only=true", "write it without the +"),
    ("verl.++trainer.val_only=true", "`++` and `~` before a key of verl's are refused"),
    ("verl.~trainer.val_only=1", "`++` and `~` before a key of verl's are refused"),
]


@with_verl
@pytest.mark.parametrize(("text", "hint"), WITHOUT_PREFIX)
def test_keys_of_verl_without_the_prefix(run: Run, text: str, hint: str) -> None:
    assert_refused(run(*DRY, "p.yaml", "--set", text), f"unknown key {text.partition('=')[0]}\n", hint)


@with_verl
@pytest.mark.parametrize(("text", "hint"), UNDER_VERL)
def test_keys_under_verl(run: Run, text: str, hint: str) -> None:
    assert_refused(run(*DRY, "p.yaml", "--set", text), f"  --set {text.partition('=')[0]}: ", hint)


@with_verl
def test_a_map_of_verls_at_the_top_of_a_file(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "p.yaml", f"{BASE}actor_rollout_ref: {{actor: {{use_dynamic_bsz: true, optim: {{lr: 1}}}}}}\n")
    assert_refused(
        run(*DRY, "p.yaml"),
        "p.yaml:6: unknown key actor_rollout_ref.actor.use_dynamic_bsz\n",
        "--set algorithm.max_tokens_per_gpu=…",
        "p.yaml:6: unknown key actor_rollout_ref.actor.optim.lr\n",
    )


@with_verl
def test_a_configuration_of_verls_is_translated_key_by_key(run: Run, tmp_path: Path) -> None:
    write(
        tmp_path / "p.yaml",
        "algorithm: {adv_estimator: grpo}\n"
        "data: {train_files: x, max_prompt_length: 4}\n"
        "trainer: {nnodes: 1, project_name: x, val_only: true}\n",
    )
    said = run(*DRY, "p.yaml")
    keys = ("algorithm.advantage", "data.train", "resources.nodes", "trainer.project", "verl.trainer.val_only")
    assert_refused(said, *(f"--set {key}=…" for key in keys))
    missing = next(line for line in said.stderr.splitlines() if "not set:" in line)
    assert "data.val" in missing
    assert "algorithm.advantage" not in missing


@with_verl
def test_wrong_keys_of_flashrl_and_of_verl_are_reported_together(run: Run) -> None:
    sets = ("rolout.n=3", "verl.data.sed=1", "verl.+actor_rollout_ref.actor.optim.wd=1")
    said = run(*DRY, "p.yaml", *(word for text in sets for word in ("--set", text)))
    hints = ("did you mean rollout.n?", "verl has no key data.sed", "FSDPOptimizerConfig has no wd")
    assert_refused(said, "3 problems\n", *hints)
