"""`flashrl eval` on checkpoints that verl itself wrote, of a policy that knows something, through the real vLLM."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flashrl_cli.evals import responses
from flashrl_cli.runs.store import PLAN_VERSION
from flashrl_cli.weights import Weights
from tests import sample_rows
from tests.integration.conftest import ENDING_S, PATIENCE_S, STEPS, Workshop, more_than_guessed

PROMPTS = 24
PREAMBLE = "Think step by step and end with the number after four hashes. " * 4
"""Longer than a block of vLLM's prefix cache, which must not outlive the weights that filled it."""
TOKENS = 16
NOISE = 2
"""Logits that rounding may change between two tokens: that of the one which an engine chose, and that of the best."""


@dataclass(frozen=True)
class Place:
    """Checkpoints in every form, and a data set with long prompts."""

    shop: Workshop
    root: Path
    saved: dict[int, Path]
    questions: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def model(self) -> Path:
        return self.saved[2] / "model"

    def eval(self, *args: object, code: int = 0) -> tuple[dict[str, Any], str]:
        """The JSON document of `flashrl eval …`, which must end with `code`, and what it said."""
        out, err = self.shop.run("eval", *args, "--max-tokens", 16, "--json", code=code)
        return json.loads(out), err


@pytest.fixture(scope="module")
def place(workshop: Workshop, saved: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("eval")
    found = Place(workshop, root, saved, root / "sums.parquet")
    write_questions(found.questions)
    shutil.copytree(saved[2] / "run", found.run)
    with_broken_steps(found.run)
    as_the_fork_saved_it(found.run / "global_step_4", root / "fork" / "global_step_4")
    plan = workshop.root / "runs" / "lora" / "attempt_1" / "plan.json"
    plan.parent.mkdir(parents=True)
    overrides = [f"actor_rollout_ref.model.path={found.model}"]
    plan.write_text(json.dumps({"schema_version": PLAN_VERSION, "overrides": overrides, "env": {}, "files": {}}))
    workshop.run("quantize", found.model, "--scheme", "int8", "-o", root / "w8a8")
    return found


def write_questions(file: Path) -> None:
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{PREAMBLE}What is {i} plus {i * 7 % 13}?"}],
            "reward_model": {"style": "rule", "ground_truth": str(i + i * 7 % 13)},
            "extra_info": {"split": "test", "index": i},
        }
        for i in range(PROMPTS)
    ]
    sample_rows.write(file, rows)


def with_broken_steps(run: Path) -> None:
    """Beside the good ones: a step with code in its weights, a torn one, a pruned one, one half-saved."""
    import torch

    for step in (5, 6, 11):
        shutil.copytree(run / "global_step_4", run / f"global_step_{step}")
    (run / "global_step_3" / "critic").mkdir(parents=True)

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {run / 'code-was-run'}",)

    torch.save({"x": Code()}, run / "global_step_5" / "actor" / "model_world_size_2_rank_1.pt")
    torn = run / "global_step_6" / "actor" / "model_world_size_2_rank_0.pt"
    torn.write_bytes(torn.read_bytes()[:5000])


def as_the_fork_saved_it(step: Path, target: Path) -> None:
    """Config and tokenizer straight in `actor/`, as the original project's fork of verl left them."""
    shutil.copytree(step, target)
    actor = target / "actor"
    (actor / "fsdp_config.json").unlink()
    for file in (actor / "huggingface").iterdir():
        file.rename(actor / file.name)
    (actor / "huggingface").rmdir()


def texts(folder: Path, run: str, step: int | None, dataset: str) -> list[str]:
    """Responses in the order of the questions."""
    rows = responses.read(folder / responses.FILE, run=run, dataset=dataset)
    return [row["response"] for row in rows if row["step"] == step]


def check_greedy(weights: Weights, prompts: list[str], ours: list[str], *, stopped: bool = False) -> None:
    """Each response is Transformers' own, token by token, up to one that float32 finds as likely as the best within
    bf16's noise.

    The noise is measured: how far the same model in bf16 is from float32, at the largest, in the logits of the tokens
    that matter. `stopped` responses ended before a text, not with an end token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.hf)
    tensors = dict(weights.tensors())
    rows = [
        encoded(tokenizer, prompt, response, stopped=stopped) for prompt, response in zip(prompts, ours, strict=True)
    ]
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(weights.hf), dtype=dtype).eval()
        assert set(model.load_state_dict(tensors, strict=False).missing_keys) <= {"lm_head.weight"}
        model.tie_weights()
        with torch.no_grad():
            logits.append([model(torch.tensor([row])).logits[0, start - 1 : -1].float() for row, start in rows])
    off, lost = [], []
    for exact, rounded, (row, start) in zip(*logits, rows, strict=True):
        chosen, best = torch.tensor(row[start:])[:, None], exact.argmax(-1, keepdim=True)
        off += [(exact.gather(1, token) - rounded.gather(1, token)).abs().max() for token in (chosen, best)]
        lost += (exact.gather(1, best) - exact.gather(1, chosen))[:, 0].tolist()
    assert len(lost) > len(prompts), "most answers have several tokens"
    assert max(lost) <= NOISE * float(max(off)), (max(lost), float(max(off)))
    assert max(off) < logits[0][0].std(), (
        "with noise as large as the differences between tokens nothing would be proven"
    )


def encoded(tokenizer: Any, prompt: str, response: str, *, stopped: bool) -> tuple[list[int], int]:
    """Token ids of a prompt and its response, whose tokens are bytes, with the end that it came to; and where the
    response begins.
    """
    chat = [{"role": "user", "content": prompt}]
    before = tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)).input_ids
    known, unknown, _ = response.partition("\ufffd")  # bytes that are no text cannot be read back
    answer = tokenizer(known).input_ids
    ended = not stopped and not unknown and len(answer) < TOKENS
    return [*before, *answer, *([tokenizer.eos_token_id] if ended else [])], len(before)


def test_every_form_of_a_checkpoint_by_one_engine(place: Place) -> None:
    """Answers are those of Transformers, whatever form the weights have; what cannot be read is told; again nothing is
    generated.
    """
    lora, w1 = place.saved[2] / "lora", place.saved[1] / "run" / "global_step_10"
    forms = (f"{place.run}/*", w1, place.root / "fork", f"{lora}/", place.saved[2] / "peft")
    out = place.root / "all"
    asked = (*forms, "--base", place.model, "--dataset", f"tiny,{place.questions}", "--limit", PROMPTS, "--out", out)
    document, said = place.eval(*asked, code=1)  # two steps are refused for their weights, and all others evaluated
    check_skipped(place, document, said)
    assert said.count("starting the vLLM engine") == 1
    assert {row["precision"] for row in document["results"]} == {"bf16"}

    runs = {row["path"]: row["run"] for row in document["results"]}
    mine, one_rank = (runs[str(path / "actor" / "huggingface")] for path in (place.run / "global_step_10", w1))
    answers = {step: texts(out, mine, step, "sums") for step in (0, *STEPS)}
    assert len(set(map(tuple, answers.values()))) == 1 + len(STEPS), "every step has weights of its own"
    for dataset in ("tiny", "sums"):
        assert texts(out, one_rank, 10, dataset) == texts(out, mine, 10, dataset)
        assert texts(out, "fork", 4, dataset) == texts(out, mine, 4, dataset)
        adapters = [texts(out, "lora", 1, dataset), texts(out, "lora", 2, dataset), texts(out, "peft", None, dataset)]
        assert adapters[0] == adapters[1] == adapters[2]
    check_against_transformers(place, out, mine)
    check_files(document, out, mine)

    shutil.rmtree(place.run / "global_step_5")  # that code is no weights shows when they are loaded
    again, said = place.eval(*asked, code=1)
    assert "starting the vLLM engine" not in said
    assert again["results"] == document["results"]
    assert again["verdicts"] == document["verdicts"]


def check_skipped(place: Place, document: dict[str, Any], said: str) -> None:
    reasons = {Path(s["path"]): s["reason"] for s in document["skipped"]}
    assert "pruned" in reasons[place.run / "global_step_3"]
    assert "refused" in reasons[place.run / "global_step_5" / "actor" / "huggingface"]
    assert "torn" in reasons[place.run / "global_step_6" / "actor" / "huggingface"]
    assert "did not finish" in reasons[place.run / "global_step_11"]
    assert "model_world_size_2_rank_1.pt" in said
    assert not (place.run / "code-was-run").exists()


def check_against_transformers(place: Place, out: Path, run: str) -> None:
    rows = responses.read(out / responses.FILE, run=run, dataset="tiny", step=10)
    prompts = [row["prompt"] for row in rows]
    cases = {
        (run, 0): Weights(hf=place.model),
        (run, 10): step_10(place),
        ("peft", None): Weights(hf=place.model, adapter=place.saved[2] / "peft", base=place.model),
    }
    for (name, step), weights in cases.items():
        check_greedy(weights, prompts, texts(out, name, step, "tiny"))


def step_10(place: Place) -> Weights:
    actor = place.run / "global_step_10" / "actor"
    return Weights(hf=actor / "huggingface", shards=tuple(sorted(actor.glob("model_world_size_2_*.pt"))))


def check_files(document: dict[str, Any], out: Path, run: str) -> None:
    """The table's numbers are those of the responses, and the policy knows how to add."""
    accuracy = {
        row["step"]: row["accuracy"] for row in document["results"] if (row["run"], row["dataset"]) == (run, "tiny")
    }
    assert list(accuracy) == [0, *STEPS]
    assert more_than_guessed(accuracy[0] * PROMPTS, PROMPTS)
    for step, value in accuracy.items():
        rows = responses.read(out / responses.FILE, run=run, dataset="tiny", step=step)
        assert sum(row["response"].endswith(f"#### {row['ground_truth']}") for row in rows) / len(rows) == value
    lines = list(csv.DictReader((out / "eval.csv").read_text().splitlines()))
    assert [int(line["step"]) for line in lines if (line["run"], line["dataset"]) == (run, "tiny")] == [0, *STEPS]


def test_killed_in_the_middle_two_go_on_together(place: Place) -> None:
    """What was finished stays, each unit is generated once, and the end is as if nothing had been."""
    words = (
        "eval",
        *(place.run / f"global_step_{step}" for step in STEPS),
        "--dataset",
        "tiny",
        "--out",
        place.root / "killed",
    )
    options = ("--limit", PROMPTS, "--max-tokens", 16, "--json")
    process = place.shop.start(*words, *options)
    assert process.stderr
    for line in process.stderr:
        if "step 2, tiny:" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    while not list((place.root / "killed").glob("results/*.parquet")):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=ENDING_S)[1]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: place.shop.run(*words, *options), range(2))
    documents = [json.loads(out) for out, _ in (first, second)]
    assert documents[0]["results"] == documents[1]["results"]
    said = first[1] + second[1]
    assert [said.count(f"step {step}, tiny: {PROMPTS} prompts") for step in STEPS] == [0, 1, 1]
    rows = [row for row in responses.read(place.root / "killed" / responses.FILE, dataset="tiny") if row["step"] == 10]
    check_greedy(step_10(place), [row["prompt"] for row in rows], [row["response"] for row in rows])


def test_sampling_and_precision(place: Place) -> None:
    """The same seed gives the same samples whatever else is evaluated; what is quantized is proven; a terminal sees a
    curve.
    """
    run = place.saved[1] / "run"
    sampled = ("--dataset", "tiny", "--limit", PROMPTS, "--n", 2, "--temperature", 1, "--max-tokens", 16)
    # a checkpoint on disk has no rotation
    int8 = (*sampled, "--rollout", "int8", "--rotation", "off", "--out", place.root / "int8")
    table, _ = place.shop.run("eval", run, *int8, "--png")
    assert "95 % interval" in table
    assert "pass@2" in table
    assert "●" in table
    assert (place.root / "int8" / "eval.png").stat().st_size > 1000
    written = json.loads((place.root / "int8" / "eval.json").read_text())
    assert (written["engine"]["precision"], written["engine"]["quantized_layers"]) == ("int8", 8)
    assert (written["rotation"], written["engine"]["rotation"]) == (0, 0)

    alone, w8a8 = run / "global_step_10", place.root / "w8a8"
    document, said = place.eval(alone, place.model, w8a8, *int8[:-1], place.root / "alone")
    assert said.count("starting the vLLM engine") == 2
    assert {row["run"]: row["precision"] for row in document["results"]} == {
        "run": "int8",
        "model": "int8",
        "w8a8": "compressed-tensors",
    }
    first = texts(place.root / "int8", "run", 10, "tiny")
    assert first == texts(place.root / "alone", "run", 10, "tiny")
    assert any(a != b for a, b in zip(first[::2], first[1::2], strict=True)), "samples of one prompt differ"
    right = next(row["accuracy"] for row in document["results"] if row["run"] == "w8a8") * 2 * PROMPTS
    assert more_than_guessed(right, 2 * PROMPTS)
    online, offline = (texts(place.root / "alone", run, None, "tiny") for run in ("model", "w8a8"))
    assert online == offline, "weights quantized on disk and while they are loaded make the same engine"


def test_prompts_of_ones_own_by_two_engines(place: Place) -> None:
    """Models without a chat template, side by side: with its text, or with prompts that have it in them, they answer
    as with the template; two engines share the questions; a stop text ends each response.
    """
    import pyarrow.parquet as pq

    template, base = place.root / "chat.jinja", place.root / "base"
    shutil.copytree(place.model, base)
    (base / "chat_template.jinja").rename(template)
    tiny = pq.read_table(place.shop.root / "data" / "tiny" / "test.parquet")
    asked = ("--limit", PROMPTS, "--max-tokens", 16, "--json")
    _, said = place.shop.run("eval", base, "--dataset", "tiny", *asked, "--out", place.root / "x", code=4)
    assert "no chat template" in said
    assert "--chat-template none" in said

    models = (base, place.saved[1] / "run" / "global_step_10")
    with_it, without = place.root / "with", place.root / "without"
    shared = ("eval", *models, "--dataset", "tiny", *asked, "--chat-template", template, "--gpus", 2, "--html")
    out, said = place.shop.run(*shared, "--out", with_it)
    document = json.loads(out)
    assert said.count("starting the vLLM engine") == 2
    (board,) = document["leaderboard"]
    assert [one["rank"] for one in board["places"]] == [1, 2]
    assert more_than_guessed(board["places"][0]["accuracy"] * PROMPTS, PROMPTS)
    prompts = [row["content"] for one in tiny["prompt"].to_pylist()[:PROMPTS] for row in one]
    check_greedy(Weights(hf=place.model), prompts, texts(with_it, "base", None, "tiny"))
    assert (with_it / "leaderboard.html").is_file()

    rows = tiny.slice(0, PROMPTS).to_pylist()
    for row in rows:  # what `--chat-template none` puts after a question is the line break at the end of the template
        chat = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant"
        row["prompt"] = [{"role": "user", "content": chat}]
    chats = sample_rows.write(place.root / "chats.parquet", rows)
    none = ("eval", base, "--dataset", chats, *asked, "--chat-template", "none", "--stop", " #", "--out", without)
    place.shop.run(*none)
    stopped = responses.read(without / responses.FILE)
    check_greedy(Weights(hf=place.model), prompts, [row["response"] for row in stopped], stopped=True)
    for row in stopped:
        assert " #" not in row["response"]
        assert row["tokens"] > len(row["response"].encode()), "the tokens of the text that ended it count"


def test_interrupt_leaves_nothing_behind(place: Place) -> None:
    out = place.root / "out"
    process = place.shop.start("eval", place.saved[1] / "run", "--dataset", "tiny", "--out", out)
    assert process.stderr
    for line in process.stderr:
        if "starting the vLLM engine" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert "error: stopped by SIGTERM\nhint: the same command goes on from here" in err
    assert not psutil.wait_procs(children, timeout=ENDING_S)[1]
    assert sorted(path.name for path in out.iterdir()) == [".engine.lock", "engine.log", "results"]


def test_merged(place: Place) -> None:
    """`--merge` writes a model that Transformers loads; into a folder with something in it nothing is written."""
    from transformers import AutoModelForCausalLM

    target = place.root / "merged"
    out, _ = place.shop.run("eval", place.saved[2] / "lora" / "global_step_1", "--merge", target, "--json")
    assert json.loads(out)["merged"] == [str(target)]
    assert AutoModelForCausalLM.from_pretrained(target).num_parameters() > 10_000
    _, err = place.shop.run("eval", place.run / "global_step_10", "--merge", target, code=2)
    assert f"error: {target} exists already" in err
