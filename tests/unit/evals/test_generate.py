"""What one engine does for several checkpoints, with a vLLM that only notes what it is asked: nothing of one is left for the next."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.evals import generate
from flashrl_cli.evals.generate import Generator, Outgrown, Spoilt, stop_tokens
from flashrl_cli.evals.job import EngineSettings, Job, Sampling
from flashrl_cli.weights import Unreadable, Weights
from tests.unit.evals.lab import checkpoint

PROMPTS = [[{"role": "user", "content": "1 + 1?"}], [{"role": "user", "content": "12 + 34?"}]]
HOLDS = {"precision": "bf16", "smoothed": 0}


class Tokenizer:
    """One token a letter, after as many as `template` has letters; `shift` is added to each."""

    def __init__(self, folder: Path) -> None:
        self.eos_token_id = 0
        told = json.loads((folder / "tokenizer.json").read_text()) if (folder / "tokenizer.json").is_file() else {}
        self.chat_template, self.shift = told.get("template", "t"), told.get("shift", 1)

    def apply_chat_template(self, prompt: Any, **_: Any) -> list[int]:
        return [self.shift] * len(self.chat_template + prompt[0]["content"])

    def decode(self, tokens: list[int], **_: Any) -> str:
        return f"{self.shift}: {tokens}"


class LLM:
    """Answers every request with one token."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, list[tuple[str, Any]]()
        self.ranks: list[dict[str, Any]] = [HOLDS]
        self.requests: list[tuple[str, Any, Any]] = []
        sizes = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 100))
        self.llm_engine = SimpleNamespace(
            vllm_config=sizes,
            add_request=lambda *request: self.requests.append(request),
            has_unfinished_requests=lambda: bool(self.requests),
            step=self.step,
        )

    def collective_rpc(self, name: str, args: Any = ()) -> list[dict[str, Any]]:
        self.calls.append((name, args))
        return self.ranks

    def reset_prefix_cache(self) -> bool:
        self.calls.append(("reset_prefix_cache", ()))
        return True

    def step(self) -> list[Any]:
        number, prompt, parameters = self.requests.pop(0)
        assert parameters["ignore_eos"], "vLLM's own ends are those of the folder that it started with"
        answer = SimpleNamespace(index=0, token_ids=parameters["stop_token_ids"], finish_reason="stop")
        return [SimpleNamespace(finished=True, request_id=number, outputs=[answer], prompt=prompt)]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`engine(checkpoint, **settings)`: a Generator that starts with it."""
    vllm = ModuleType("vllm")
    parameters = ModuleType("vllm.sampling_params")
    vars(vllm).update(LLM=LLM, SamplingParams=lambda **options: options)
    vars(parameters).update(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    monkeypatch.setattr(generate, "tokenizer_of", Tokenizer)
    monkeypatch.setattr(generate, "_platform_options", lambda job: {})
    monkeypatch.setenv("FLASHRL_ROLLOUT", "")

    def start(one: Any, *, quantized: str | None = None, **settings: Any) -> Any:
        sampling = Sampling(max_tokens=10)
        job = Job(
            start=one.hf,
            quantized=quantized,
            work=tmp_path,
            data_sets=1,
            sampling=sampling,
            engine=EngineSettings(**settings),
        )
        return Generator(job, PROMPTS)

    return start


def say(one: Any, **told: Any) -> Any:
    """A checkpoint with a tokenizer, or with another key of the tokenizer's."""
    (one.hf / "tokenizer.json").write_text(json.dumps(told))
    return one


def texts(found: Any) -> list[str]:
    return [sample.response for samples in found.answer(dict(enumerate(PROMPTS))) for sample in samples]


def test_each_checkpoint_is_spoken_to_in_its_own_words(engine: Any, tmp_path: Path) -> None:
    first, second = say(checkpoint(tmp_path, 1), shift=3), say(checkpoint(tmp_path, 2, eos_token_id=[7, 8]), shift=4)
    found = engine(first)
    for one, wanted in ((first, "3: [0]"), (second, "4: [0, 7, 8]"), (first, "3: [0]")):
        found.load(one.weights)
        assert texts(found) == [wanted] * 2
    names = [name for name, _ in found._llm.calls]
    assert names == ["load_from_disk", "reset_prefix_cache"] * 3
    found.load(first.weights)
    assert len(found._llm.calls) == 6, "what is held is not loaded again"


def test_what_cannot_be_taken_leaves_the_one_before(engine: Any, tmp_path: Path) -> None:
    """Its weights, its tokenizer and its stop tokens."""
    first, torn = say(checkpoint(tmp_path, 1), shift=3), say(checkpoint(tmp_path, 2, eos_token_id=[7]), shift=4)
    found = engine(first)
    found.load(first.weights)
    found._llm.ranks = [{"unreadable": "torn", "spoilt": False}]
    with pytest.raises(Unreadable, match="torn") as raised:
        found.load(torn.weights)
    assert not isinstance(raised.value, Spoilt)
    before = len(found._llm.calls)
    found.load(first.weights)
    assert len(found._llm.calls) == before
    assert texts(found) == ["3: [0]"] * 2


@pytest.mark.parametrize(
    "ranks",
    [
        [{"unreadable": "torn", "spoilt": True}],
        [HOLDS, {"unreadable": "torn", "spoilt": False}],
        [{"unreadable": "torn", "spoilt": False}, {"unreadable": "torn too", "spoilt": True}],
    ],
)
def test_an_engine_of_which_a_rank_holds_other_weights_is_spoilt(
    engine: Any, tmp_path: Path, ranks: list[dict[str, Any]]
) -> None:
    one = checkpoint(tmp_path, 1)
    found = engine(one)
    found._llm.ranks = ranks
    with pytest.raises(Spoilt, match="torn"):
        found.load(one.weights)


def test_other_weights_in_the_same_place_are_loaded(engine: Any, tmp_path: Path) -> None:
    """A run that starts over writes its steps anew; a step that was removed stays in the engine until another is loaded."""
    one = say(checkpoint(tmp_path, 1), shift=3)
    found = engine(one)
    found.load(one.weights)
    file = one.hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x09")
    found.load(one.weights)
    say(one, shift=5)
    found.load(one.weights)
    assert [name for name, _ in found._llm.calls].count("load_from_disk") == 3
    file.unlink()
    found.load(one.weights)
    assert texts(found) == ["5: [0]"] * 2


def test_a_longer_template_asks_for_an_engine_of_its_own(engine: Any, tmp_path: Path) -> None:
    """In one whose sequences are too short its responses would be cut, or its prompts refused."""
    first, longer = say(checkpoint(tmp_path, 1)), say(checkpoint(tmp_path, 2), template="tt")
    found = engine(first)
    assert found._llm.options["max_model_len"] == len("t12 + 34?") + 10
    found.load(first.weights)
    with pytest.raises(Outgrown):
        found.load(longer.weights)
    alone = engine(longer)
    alone.load(longer.weights)
    alone.load(first.weights)
    both = engine(first, max_model_len=64)
    both.load(first.weights)
    both.load(longer.weights)


def test_a_limit_of_the_model_holds_for_each(engine: Any, tmp_path: Path) -> None:
    first, longer = (say(checkpoint(tmp_path, n, max_position_embeddings=12), template="t" * n) for n in (1, 2))
    found = engine(first)
    assert found._llm.options["max_model_len"] == 12
    found.load(longer.weights)


def test_quantized_weights_are_those_that_the_engine_started_with(engine: Any, tmp_path: Path) -> None:
    one = checkpoint(tmp_path, 1)
    found = engine(one, quantized="compressed-tensors")
    assert found.load(one.weights)["precision"] == "compressed-tensors"
    file = one.hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x09")
    with pytest.raises(Outgrown):
        found.load(one.weights)


def test_a_tokenizer_of_more_words_than_the_model_has_is_refused(engine: Any, tmp_path: Path) -> None:
    first, larger = say(checkpoint(tmp_path, 1), shift=99), say(checkpoint(tmp_path, 2), shift=100)
    found = engine(first)
    found.load(first.weights)
    with pytest.raises(Unreadable, match=r"2 gives token 100, the model has tokens up to 99$"):
        found.load(larger.weights)
    assert texts(found) == ["99: [0]"] * 2


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({}, None, [0]),
        ({"eos_token_id": 5}, None, [0, 5]),
        ({"eos_token_id": [6, 5]}, None, [0, 5, 6]),
        ({"eos_token_id": [5, 6]}, {}, [0, 5, 6]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": None, "temperature": 0.6}, [0, 5, 6]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [7]}, [0, 7]),
        ({}, {"eos_token_id": 7}, [0, 7]),
        ({"eos_token_id": None}, {"eos_token_id": [0, 7]}, [0, 7]),
        ({"text_config": {"eos_token_id": [5]}}, None, [0, 5]),
        ({"eos_token_id": 4, "text_config": {"eos_token_id": [5]}}, None, [0, 4]),
        ({"text_config": None}, {}, [0]),
    ],
)
def test_stop_tokens(tmp_path: Path, config: dict[str, Any], generation: Any, wanted: list[int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path, SimpleNamespace(eos_token_id=0)) == wanted
    without = [end for end in wanted if end] if generation != {"eos_token_id": [0, 7]} else wanted
    assert stop_tokens(tmp_path, SimpleNamespace(eos_token_id=None)) == without


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_files_beside_the_weights_are_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{")
    with pytest.raises(Unreadable, match=f"{name} is damaged"):
        stop_tokens(tmp_path, SimpleNamespace(eos_token_id=0))


def test_the_weights_are_named_as_they_lie(engine: Any, tmp_path: Path) -> None:
    one = checkpoint(tmp_path, 1)
    found = engine(one)
    found.load(one.weights)
    (name, (source,)) = found._llm.calls[0]
    assert (name, Weights.of(source)) == ("load_from_disk", one.weights)
