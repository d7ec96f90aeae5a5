"""Pairs of odd checkpoints in one engine: each answers bit for bit as it does in any other company, and as Transformers
does.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data import arith
from flashrl_cli.weights import Weights
from tests.integration.conftest import PATIENCE_S, Workshop

NEAR = 0.5
"""Nats by which a greedy token may be less likely than the likeliest, in float32: in bf16 a sum's order decides between
near ones.
"""
PREAMBLE = "Add with care. " * 2
"""Longer than a block of vLLM's prefix cache, which must not outlive the weights that filled it."""
PROMPTS = [[{"role": "user", "content": f"{PREAMBLE}{arith.question(*pair)}"}] for pair in arith.pairs(0)["test"][:8]]
NINE, HASH, SPACE = 24, 2, 220
"""Tokens of the tiny policy that are common in its answers."""
ENGLISH = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
END = 258


def config_of(folder: Path, name: str = "config.json", **keys: Any) -> None:
    """Set keys of a JSON file, or remove those that are None."""
    file = folder / name
    data = {**(json.loads(file.read_text()) if file.is_file() else {}), **keys}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[str, Any], Any]) -> None:
    """Change each tensor, or leave it out where `change` gives None."""
    from safetensors.torch import load_file, save_file

    found = load_file(folder / "model.safetensors")
    kept = {name: new for name, tensor in found.items() if (new := change(name, tensor)) is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def noisy(share: float, seed: int) -> Callable[[str, Any], Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda _, tensor: (tensor * (1 + share * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)


def doubled_without(left_out: str) -> Callable[[str, Any], Any]:
    return lambda name, tensor: None if name == left_out else tensor * 2


def ends_in_config(folder: Path) -> None:
    """The ends stand in config.json alone."""
    (folder / "generation_config.json").unlink()
    config_of(folder, eos_token_id=[END, NINE])


def ends_in_both(folder: Path) -> None:
    """Two files name other ends: the generation config's hold."""
    config_of(folder, eos_token_id=[END, NINE])
    config_of(folder, "generation_config.json", eos_token_id=[END, SPACE])


def ends_in_generation(folder: Path) -> None:
    config_of(folder, eos_token_id=None)
    config_of(folder, "generation_config.json", eos_token_id=[HASH])


def ends_nowhere(folder: Path) -> None:
    """Only the tokenizer says what ends an answer."""
    (folder / "generation_config.json").unlink()
    config_of(folder, eos_token_id=None)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(ENGLISH)


def other_end(folder: Path) -> None:
    """Another token of the tokenizer's ends an answer, and other weights."""
    config_of(folder, "tokenizer_config.json", eos_token="<|im_start|>")
    ends_in_generation(folder)
    rewrite(folder, noisy(0.05, 1))


def in_float32(folder: Path) -> None:
    config_of(folder, dtype="float32")
    rewrite(folder, lambda name, tensor: noisy(0.05, 2)(name, tensor.float()))


def in_float16(folder: Path) -> None:
    config_of(folder, dtype="float16")
    rewrite(folder, lambda _, tensor: (tensor.float() * 0.98).half())


ODD: dict[str, Callable[[Path], None]] = {
    "plain": lambda _: None,
    "ends in config.json": ends_in_config,
    "ends in both files": ends_in_both,
    "ends in generation_config.json": ends_in_generation,
    "ends nowhere": ends_nowhere,
    "another template": other_template,
    "another end": other_end,
    "float32": in_float32,
    "float16": in_float16,
}
TORN: dict[str, tuple[str, str]] = {
    "without a shard": ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.qkv_proj.weight"),
    "without a bias": ("model.layers.1.self_attn.v_proj.bias", "model.layers.1.self_attn.qkv_proj.bias"),
    "without a matrix": ("model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "without a norm": ("model.norm.weight", "model.norm.weight"),
}
"""What is left out, and the engine's parameter that lacks it."""


def pairs(names: list[str]) -> Iterator[str]:
    """A walk over `names` that takes each ordered pair of them, and each once after itself, exactly once."""
    left = {name: [*names] for name in names}
    stack, walk = [names[0]], list[str]()
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return reversed(walk)


@pytest.fixture(scope="module")
def checkpoints(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """Every odd checkpoint, an adapter, and the torn ones."""
    source = workshop.root / "data" / "tiny" / "model"
    root = tmp_path_factory.mktemp("odd")
    found = {}
    for name in (*ODD, *TORN):
        folder = root / name.replace(" ", "-")
        shutil.copytree(source, folder)
        if name in ODD:
            ODD[name](folder)
        else:
            rewrite(folder, doubled_without(TORN[name][0]))
        found[name] = Weights(hf=folder)
    adapter = root / "adapter"
    write_adapter(source, adapter)
    found["an adapter"] = Weights(hf=source, adapter=adapter, base=source)
    return found


def write_adapter(source: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(str(folder))


def in_one_engine(folder: Path, checkpoints: dict[str, Weights], order: list[str], rollout: str) -> list[Any]:
    """What an engine of its own process gave to each of `order`."""
    folder.mkdir()
    job = {
        "out": str(folder / "out.json"),
        "checkpoints": {name: weights.plain() for name, weights in checkpoints.items()},
        "order": order,
        "torn": list(TORN),
        "prompts": PROMPTS,
        "rollout": rollout,
    }
    (folder / "job.json").write_text(json.dumps(job))
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "FLASHRL_PLUGIN_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("shared_engine.py")), str(folder / "job.json")]
    done = subprocess.run(command, env=env, check=False, timeout=PATIENCE_S, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads((folder / "out.json").read_text()))


def check_by_transformers(weights: Weights, rows: list[list[int]], name: str) -> None:
    """Each answer is greedy to Transformers' own reading of the folder, and ends where that, or the tokenizer, says and
    nowhere else.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.hf)
    model = AutoModelForCausalLM.from_pretrained(weights.hf, dtype=torch.float32).eval()
    if weights.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(weights.adapter)).eval()
    stated = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    for prompt, row in zip(PROMPTS, rows, strict=True):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            scores = model(torch.tensor([before + row])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        behind = scores.max(-1).values - scores.gather(-1, torch.tensor(row)[:, None])[:, 0]
        assert float(behind.max()) < NEAR, (name, row, behind)
        assert not ends.intersection(row[:-1]), (name, row)
        assert len(row) == 16 or row[-1] in ends, (name, row)


def test_every_pair_of_checkpoints_in_one_engine(checkpoints: dict[str, Weights], tmp_path: Path) -> None:
    """All ordered pairs in one engine and the reverse in another, which starts with another one; torn ones in between
    change nothing.
    """
    whole = [name for name in checkpoints if name not in TORN]
    walk = list(pairs(whole))
    assert {(a, b) for a, b in itertools.pairwise(walk)} == {(a, b) for a in whole for b in whole}
    for place, name in enumerate(TORN):
        walk.insert((place + 1) * len(walk) // (len(TORN) + 1), name)
    backwards = ["another end", *reversed(whole), *TORN, *whole]
    found: dict[str, list[Any]] = {}
    for number, order in enumerate((walk, backwards)):
        for name, result in zip(order, in_one_engine(tmp_path / str(number), checkpoints, order, "bf16"), strict=True):
            found.setdefault(name, []).append(result)
    for name in whole:
        assert len(found[name]) > len(whole)
        assert all(result == found[name][0] for result in found[name]), name
    for name, (_, parameter) in TORN.items():
        why = f"the weight update left 1 parameter of the engine unwritten: {parameter}"
        assert found[name] == [{"unreadable": why, "spoilt": True}] * 2
    check_answers({name: found[name][0]["greedy"] for name in whole}, checkpoints)


def check_answers(greedy: dict[str, list[list[list[int]]]], checkpoints: dict[str, Weights]) -> None:
    """They are Transformers', end where the checkpoint says, and differ from one checkpoint to the other."""
    for name, rows in greedy.items():
        check_by_transformers(checkpoints[name], [row[0] for row in rows], name)
    last = {name: {row[0][-1] for row in rows if len(row[0]) < 16} for name, rows in greedy.items()}
    assert NINE in last["ends in config.json"]
    assert NINE not in last["ends in both files"] | last["plain"]
    assert last["ends in both files"] <= {END, SPACE}
    assert SPACE in last["ends in both files"]
    assert HASH in last["ends in generation_config.json"]
    assert last["ends nowhere"] <= {END}
    assert END not in last["another end"], "the end of the checkpoint that the engine started with"
    for name in ("another template", "another end", "float32", "an adapter"):
        assert greedy[name] != greedy["plain"], name
    assert greedy["ends nowhere"] == greedy["plain"]
