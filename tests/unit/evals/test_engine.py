"""The engine process of an evaluation, without vLLM: what ends an order and the process, and one engine for several
checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrl_cli.evals import engine, job, results
from flashrl_cli.evals.engine import Generator, Outgrown
from flashrl_cli.evals.job import EngineSettings, Job, Order, Sampling
from flashrl_cli.evals.questions import Prompting
from flashrl_cli.evals.results import Response
from flashrl_cli.verl.causes import CAUSES
from flashrl_cli.weights import Unreadable, Weights
from flashrl_cli.worker import engine as factory
from flashrl_cli.worker.engine import Spoilt
from tests.unit.evals.lab import ENGINE, SAMPLING, checkpoint, data, response

Events = list[dict[str, Any]]


def test_job_and_order_come_back_as_they_were_written() -> None:
    asked = Job(
        start=Path("/hf"),
        quantized=None,
        work=Path("/w"),
        data_sets=1,
        sampling=Sampling(stop=("\n", "Q:")),
        prompting=Prompting(system="Add.", shots=2, chat_template="", arguments={"enable_thinking": False}),
        engine=EngineSettings(rollout="int8"),
    )
    assert Job.of(json.loads(json.dumps(asked.plain()))) == asked
    trained = Order(
        weights=Weights(hf=Path("/hf"), shards=(Path("/a.pt"),)), data=0, answers=Path("/x"), questions=(3,)
    )
    adapted = replace(trained, weights=Weights(hf=Path("/hf"), adapter=Path("/lora"), base=Path("/base")), questions=())
    for one in (trained, adapted):
        assert Order.of(json.loads(json.dumps(one.plain()))) == one


def test_the_hints_are_for_causes_that_exist() -> None:
    assert set(job.HINTS) <= {cause.id for cause in CAUSES}


class Scripted:
    """Answers all prompts; weights called `torn`, `spoilt` or `longer` cannot be taken, nor can a start called
    `bad`."""

    started = 0

    def __init__(self, job: Job, prompts: list[Any]) -> None:
        Scripted.started += 1
        if job.start.name == "bad":
            raise Unreadable("no tokenizer")
        assert len(prompts) == 3

    def load(self, weights: Weights) -> dict[str, Any]:
        if weights.hf.name == "torn":
            raise Unreadable("torn")
        if weights.hf.name == "spoilt":
            raise Spoilt("half of it is in the engine")
        if weights.hf.name == "longer":
            raise Outgrown
        return {"precision": "bf16"}

    def answer(self, prompts: dict[int, Any]) -> Iterator[list[Response]]:
        yield from ([response(number)] for number in prompts)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`serve(start, *orders)`: the events, and whether the engine waits for another order at the end."""
    monkeypatch.setattr(engine, "Generator", Scripted)
    monkeypatch.setattr(Scripted, "started", 0)

    def run(start: str, *orders: Order) -> tuple[Events, bool]:
        job = Job(start=Path(start), quantized=None, work=tmp_path, data_sets=1, sampling=SAMPLING, engine=ENGINE)
        job.write_questions(0, data().questions)
        events: Events = []
        waiting = iter([one.plain() for one in orders])
        engine.serve(job.plain(), waiting, lambda event, **more: events.append({"event": event, **more}))
        return events, not list(waiting)

    return run


def order(name: str, folder: Path, *questions: int) -> Order:
    return Order(weights=Weights(hf=Path(name)), data=0, answers=folder / "answers.jsonl", questions=questions)


def kinds(events: Events) -> list[str]:
    return [event["event"] for event in events]


def test_answers_are_written_as_they_come(serve: Any, tmp_path: Path) -> None:
    events, _ = serve("good", order("a", tmp_path, 0, 2))
    assert kinds(events) == ["stage", "loaded", "advance", "advance", "done"]
    assert sorted(results.read_answers(tmp_path / "answers.jsonl")) == [0, 2]


def test_what_cannot_be_read_does_not_end_the_process(serve: Any, tmp_path: Path) -> None:
    events, all_taken = serve("good", order("torn", tmp_path), order("a", tmp_path))
    assert events[1] == {"event": "skipped", "reason": "torn", "ends": False}
    assert kinds(events)[-1] == "done"
    assert Scripted.started == 1
    assert all_taken


@pytest.mark.parametrize(
    ("start", "first", "last"),
    [
        ("good", "spoilt", {"event": "skipped", "reason": "half of it is in the engine", "ends": True}),
        ("bad", "a", {"event": "skipped", "reason": "no tokenizer", "ends": True}),
        ("good", "longer", {"event": "restart"}),
    ],
)
def test_what_ends_the_process(serve: Any, tmp_path: Path, start: str, first: str, last: dict[str, Any]) -> None:
    events, all_taken = serve(start, order(first, tmp_path), order("a", tmp_path))
    assert events[-1] == last
    assert not all_taken


PROMPTS = [[{"role": "user", "content": "1 + 1?"}], [{"role": "user", "content": "12 + 34?"}]]
HOLDS = {"precision": "bf16", "smoothed": 0}


class Tokenizer:
    """One token a letter, after as many as `template` has letters; `shift` is added to each."""

    name_or_path = "/models/a"

    def __init__(self, folder: Path, *, chat: bool = True) -> None:
        self.eos_token_id = 0
        found = json.loads((folder / "tokenizer.json").read_text()) if (folder / "tokenizer.json").is_file() else {}
        self.chat_template, self.shift = found.get("template", "t"), found.get("shift", 1)

    def apply_chat_template(self, prompt: Any, **_: Any) -> list[int]:
        return [self.shift] * len(self.chat_template + prompt[0]["content"])

    def decode(self, tokens: list[int], **_: Any) -> str:
        return f"{self.shift}: {tokens}"


class LLM:
    """Answers every request with one token."""

    def __init__(self, model: str, **options: Any) -> None:
        self.options, self.calls = options, list[tuple[str, Any]]()
        self.ranks: list[dict[str, Any]] = [HOLDS]
        self.requests: list[tuple[str, Any, Any]] = []
        self.asked: list[Any] = []
        sizes = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 100))
        self.llm_engine = SimpleNamespace(
            vllm_config=sizes,
            add_request=self.add,
            has_unfinished_requests=lambda: bool(self.requests),
            step=self.step,
            output_processor=SimpleNamespace(tokenizer=None),
        )

    def collective_rpc(self, name: str, args: Any = ()) -> list[dict[str, Any]]:
        self.calls.append((name, args))
        return self.ranks

    def reset_prefix_cache(self) -> bool:
        self.calls.append(("reset_prefix_cache", ()))
        return True

    def add(self, *request: Any) -> None:
        self.requests.append(request)
        self.asked.append(request[2])

    def step(self) -> list[Any]:
        number, prompt, parameters = self.requests.pop(0)
        assert parameters["ignore_eos"], "vLLM's own ends are those of the folder that it started with"
        answer = SimpleNamespace(index=0, token_ids=parameters["stop_token_ids"], finish_reason="stop")
        return [SimpleNamespace(finished=True, request_id=number, outputs=[answer], prompt=prompt)]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`started(checkpoint, **settings)`: a Generator that starts with it."""
    parameters = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **options: options))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    monkeypatch.setattr(factory, "start", LLM)
    monkeypatch.setattr(factory, "tokenizer_of", Tokenizer)
    monkeypatch.setenv("FLASHRL_ROLLOUT", "")

    def start(one: Any, *, quantized: str | None = None, sampling: Sampling | None = None, **settings: Any) -> Any:
        asked, how = sampling or Sampling(max_tokens=10), EngineSettings(**settings)
        job = Job(start=one.hf, quantized=quantized, work=tmp_path, data_sets=1, sampling=asked, engine=how)
        return Generator(job, PROMPTS)

    return start


def say(one: Any, **tokenizer: Any) -> Any:
    """A checkpoint with a tokenizer, or with another key of the tokenizer's."""
    (one.hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    return one


def texts(found: Any) -> list[str]:
    return [sample.response for samples in found.answer(dict(enumerate(PROMPTS))) for sample in samples]


def test_each_checkpoint_is_spoken_to_in_its_own_words(started: Any, tmp_path: Path) -> None:
    first, second = say(checkpoint(tmp_path, 1), shift=3), say(checkpoint(tmp_path, 2, eos_token_id=[7, 8]), shift=4)
    found = started(first)
    for one, wanted in ((first, "3: [0]"), (second, "4: [0, 7, 8]"), (first, "3: [0]")):
        found.load(one.weights)
        assert texts(found) == [wanted] * 2
    names = [name for name, _ in found._llm.calls]
    (_, (source,)) = found._llm.calls[0]
    assert Weights.of(source) == first.weights
    assert names == ["load_from_disk", "reset_prefix_cache"] * 3
    found.load(first.weights)
    assert len(found._llm.calls) == 6, "what is held is not loaded again"


def test_what_cannot_be_taken_leaves_the_one_before(started: Any, tmp_path: Path) -> None:
    """Its weights, its tokenizer and its stop tokens."""
    first, torn = say(checkpoint(tmp_path, 1), shift=3), say(checkpoint(tmp_path, 2, eos_token_id=[7]), shift=4)
    found = started(first)
    found.load(first.weights)
    found._llm.ranks = [{"unreadable": "torn", "spoilt": False}]
    with pytest.raises(Unreadable, match="torn") as raised:
        found.load(torn.weights)
    assert not isinstance(raised.value, Spoilt)
    before = len(found._llm.calls)
    found.load(first.weights)
    assert len(found._llm.calls) == before
    assert texts(found) == ["3: [0]"] * 2


def test_other_weights_in_the_same_place_are_loaded(started: Any, tmp_path: Path) -> None:
    """A run that starts over writes its steps anew; a step that was removed stays in the engine until another is
    loaded."""
    one = say(checkpoint(tmp_path, 1), shift=3)
    found = started(one)
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


def test_a_longer_template_asks_for_an_engine_of_its_own(started: Any, tmp_path: Path) -> None:
    """In one whose sequences are too short its responses would be cut, or its prompts refused."""
    first, longer = say(checkpoint(tmp_path, 1)), say(checkpoint(tmp_path, 2), template="tt")
    found = started(first)
    assert found._llm.options["max_model_len"] == len("t12 + 34?") + 10
    found.load(first.weights)
    with pytest.raises(Outgrown):
        found.load(longer.weights)
    alone = started(longer)
    alone.load(longer.weights)
    alone.load(first.weights)
    both = started(first, max_model_len=64)
    both.load(first.weights)
    both.load(longer.weights)


def test_a_limit_of_the_model_holds_for_each(started: Any, tmp_path: Path) -> None:
    first, longer = (say(checkpoint(tmp_path, n, max_position_embeddings=12), template="t" * n) for n in (1, 2))
    found = started(first)
    assert found._llm.options["max_model_len"] == 12
    found.load(longer.weights)


def test_quantized_weights_are_those_that_the_engine_started_with(started: Any, tmp_path: Path) -> None:
    one = checkpoint(tmp_path, 1)
    found = started(one, quantized="compressed-tensors")
    assert found.load(one.weights)["precision"] == "compressed-tensors"
    file = one.hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x09")
    with pytest.raises(Outgrown):
        found.load(one.weights)


def test_a_tokenizer_of_more_words_than_the_model_has_is_refused(started: Any, tmp_path: Path) -> None:
    first, larger = say(checkpoint(tmp_path, 1), shift=99), say(checkpoint(tmp_path, 2), shift=100)
    found = started(first)
    found.load(first.weights)
    with pytest.raises(Unreadable, match=r"2 gives token 100, the model has tokens up to 99$"):
        found.load(larger.weights)
    assert texts(found) == ["99: [0]"] * 2


def test_stop_texts_and_top_k_reach_vllm_with_each_tokenizer(started: Any, tmp_path: Path) -> None:
    """A response ends before the first of the texts; vLLM looks for them in what it decodes, and does not cut ids."""
    first, second = say(checkpoint(tmp_path, 1), shift=3), say(checkpoint(tmp_path, 2, eos_token_id=[7, 8]), shift=4)
    found = started(first, sampling=Sampling(max_tokens=10, top_k=5, stop=(", 8", "0, 7")))
    found.load(first.weights)
    assert texts(found) == ["3: [0]"] * 2
    assert found._llm.llm_engine.output_processor.tokenizer is found._text.tokenizer
    found.load(second.weights)
    assert texts(found) == ["4: ["] * 2
    assert found._llm.llm_engine.output_processor.tokenizer.shift == 4
    one = found._llm.asked[0]
    assert (one["stop"], one["detokenize"], one["top_k"]) == ([", 8", "0, 7"], True, 5)
    plain = started(first)
    plain.load(first.weights)
    assert texts(plain) == ["3: [0]"] * 2
    assert (plain._llm.asked[0]["detokenize"], plain._llm.llm_engine.output_processor.tokenizer) == (False, None)
