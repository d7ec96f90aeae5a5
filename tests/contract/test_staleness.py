"""Figures by staleness are verl's own of the same tokens, and verl's client says which version sampled each token."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashrl_cli import contract
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.plugins import log_ratios, staleness
from flashrl_cli.verl.metrics import FIGURES, NAMES, read_step

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing verl warns of much that is not ours."""
LENGTHS = (9, 40, 25, 0, 31)
"""The fourth response is padding."""
CAP = 1.5
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"rollout_is": None},
    "tis": {"rollout_is": "token", "rollout_is_threshold": CAP},
    "icepop": {"rollout_is": "token", "rollout_is_threshold": f"0.5_{CAP}"},
    "rejection": {
        "rollout_is": "token",
        "rollout_is_threshold": CAP,
        "rollout_rs": "token_k1",
        "rollout_rs_threshold": "0.8_1.2",
    },
}


def tensors(seed: int = 3) -> dict[str, Any]:
    """Log-probs and mask of a batch [5, 40]."""
    import torch

    make = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    rollout = -torch.rand(shape, generator=make) * 3
    trainer = (rollout + 0.3 * torch.randn(shape, generator=make)).clamp(max=0)
    return {"old_log_probs": trainer, "rollout_log_probs": rollout, "response_mask": mask, "responses": mask}


@pytest.fixture(autouse=True)
def verls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's module of corrections, which afterwards is as it was."""
    import verl.trainer.ppo.rollout_corr_helper as module

    name = "compute_rollout_correction_and_rejection_mask"
    monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(staleness, "_STEP", staleness._Step())
    staleness.report()
    return module


def trainer_of(batches: list[list[dict[str, Any]]], correction: dict[str, Any], mode: str = "separate_async") -> Any:
    """A trainer that corrects batches with the given tags as verl's does, one after another in a step."""

    class Trainer:
        trainer_mode = mode
        global_steps = 8
        local_trigger_step = 0
        parameter_sync_step = len(batches)

        def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> None:
            for number, tags in enumerate(batches):
                self.local_trigger_step = number
                self._compute_advantage(SimpleNamespace(tags=tags, seed=number), metrics)

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> None:
            import verl.trainer.ppo.rollout_corr_helper as corrections
            from verl import DataProto
            from verl.utils.debug.metrics import calculate_debug_metrics

            data = DataProto.from_dict(tensors=tensors(batch.seed))
            metrics.update(calculate_debug_metrics(data))
            _, found = corrections.compute_rollout_correction_and_add_to_batch(data, correction)
            metrics.update(found)

    trainer = Trainer()
    staleness.watch(trainer)
    return trainer


def done(
    batches: list[list[dict[str, Any]]], correction: str = "tis", mode: str = "separate_async"
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    trainer_of(batches, CORRECTIONS[correction], mode).step(metrics, {})
    return metrics


def tags(*numbers: int) -> list[dict[str, Any]]:
    """Rows of which each is of one version."""
    return [{"min_global_steps": number, "max_global_steps": number} for number in numbers]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_at_staleness_0_the_figures_are_those_of_the_step(correction: str) -> None:
    """Which in mode `sync` are all that there is."""
    found = read_step(8, done([tags(7, 7, 7, 7, 7)], correction))
    assert found.stalenesses == (0,)
    compared = [name for name in FIGURES if name in NAMES and name != "tokens" and found[name] is not None]
    assert len(compared) == (4 if correction == "none" else 7)
    for name in compared:
        assert found[f"{name}@0"] == pytest.approx(found[name], rel=1e-4, abs=1e-6), name
    assert (found["share@0"], found["tokens@0"], found.fresh) == (1, sum(LENGTHS), "@0")
    synchronous = read_step(8, done([tags(7, 7, 7, 7, 7)], correction, mode="sync"))
    assert synchronous.values == {name: value for name, value in found.values.items() if "@" not in name}


def test_parts_of_the_step_add_up_to_it() -> None:
    pieces = {"versions": [[4, 10], [6, 5], [7, 10]], "min_global_steps": 3, "max_global_steps": 7}
    found = read_step(8, done([[*tags(7, 6), pieces, *tags(0, 5)]]))
    assert found.stalenesses == (0, 1, 2, 3)
    assert [found[f"tokens@{number}"] for number in range(4)] == [9 + 10, 40 + 5, 31, 10]
    for name in ("kl", "kl_k3", "weight_mean", "truncated", "prob_diff"):
        parts = [found[f"{name}@{number}"] * found[f"share@{number}"] for number in range(4)]  # type: ignore[operator]
        assert sum(parts) == pytest.approx(found[name], rel=1e-4, abs=1e-6), name


def test_the_batches_of_a_step_are_taken_together() -> None:
    """All are weighted against the weights at its start, and their tokens count alike."""
    found = read_step(8, done([tags(7, 6, 6, 6, 6), tags(6, 6, 6, 6, 7)]))
    assert (found["tokens@0"], found["tokens@1"]) == (9 + 31, 40 + 25 + 31 + 9 + 40 + 25)
    first, second = tensors(0), tensors(1)
    ratios = [
        (one["rollout_log_probs"] - one["old_log_probs"])[row, :length]
        for one, row, length in ((first, 0, 9), (second, 4, 31))
    ]
    assert found["kl@0"] == pytest.approx(float(np.concatenate(ratios).mean()), rel=1e-4)


def test_weights_of_responses_are_cut_with_all_their_tokens() -> None:
    settings = {"rollout_is": "sequence", "rollout_is_threshold": CAP}
    metrics: dict[str, float] = {}
    trainer_of([tags(7, 6, 5, 4, 3)], settings).step(metrics, {})
    found, batch = read_step(8, metrics), tensors(0)
    for row, length in enumerate(LENGTHS):
        if length:
            log = float((batch["old_log_probs"] - batch["rollout_log_probs"])[row, :length].sum())
            assert found[f"truncated@{row}"] == (log > np.log(CAP))
            assert found[f"weight_mean@{row}"] == pytest.approx(min(np.exp(log), CAP), rel=1e-4)


def test_without_versions_there_are_no_figures() -> None:
    assert read_step(8, done([[*tags(7, 7, 7), {}, {}]])).stalenesses == ()


def test_kept_log_ratios_have_their_staleness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of all batches of a step, in one file."""
    monkeypatch.setenv(contract.ENV_PLUGIN_DIR, str(AttemptPaths(tmp_path).plugins))
    monkeypatch.setenv(contract.ENV_KEEP, "4")
    monkeypatch.setattr(log_ratios, "_WRITTEN", [])
    batches = [tags(7, 6, 5, 4, 3), tags(7, 7, 7, 7, 6)]

    class Trainer:
        trainer_mode, global_steps, local_trigger_step, parameter_sync_step = "separate_async", 8, 0, 2

        def step(self, *_: Any) -> None:
            for number, rows in enumerate(batches):
                self.local_trigger_step = number
                self._compute_advantage(SimpleNamespace(tags=rows, seed=number), {})

        def _compute_advantage(self, batch: Any, _: Any) -> None:
            given = tensors(batch.seed)
            log_ratios._keep(8, {**given, "advantages": given["old_log_probs"]}, given["response_mask"])

    trainer = Trainer()
    staleness.watch(trainer)
    trainer.step({}, {})
    found = log_ratios.read(log_ratios.file_of(AttemptPaths(tmp_path).log_ratios, 8))
    assert (len(found.lengths), found.responses) == (4, 8)
    rows = log_ratios.rows_to_keep(8, 2, np.array(LENGTHS))
    assert found.most_stale().tolist() == [*rows.tolist(), *(int(row == 4) for row in rows)]
    chosen = found.chosen(found.most_stale() == int(rows[0]))
    assert chosen.lengths[0] == LENGTHS[rows[0]]


class Server:
    """A rollout server that gives the next of its answers to each request: a version, tokens, whether it ends there."""

    def __init__(self, answers: list[tuple[int, int, bool]]) -> None:
        self.answers = answers
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, **_: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        await asyncio.sleep(0)
        version, tokens, ends = self.answers.pop(0)
        return TokenOutput(
            token_ids=[version] * tokens,
            log_probs=[-1.0] * tokens,
            stop_reason="completed" if ends else "aborted",
            extra_fields={"global_steps": version},
        )


def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's client with one server and without a load balancer, which does not wait before it resumes a response."""
    from omegaconf import OmegaConf
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient

    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"response_length": 64, "name": "vllm"}}})
    made: Any = staleness.note_versions(FullyAsyncLLMServerClient(config))

    async def acquire(*_: Any, **__: Any) -> tuple[str, Any]:
        return "here", server

    made._acquire_server, made._release_server = acquire, lambda *_, **__: None
    real = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda _: real(0))
    return made


def test_the_client_notes_the_version_of_each_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(3, 4, False), (4, 0, False), (5, 2, False), (5, 6, True), (6, 3, True)]

    async def main() -> tuple[Any, Any]:
        made = client(Server(answers), monkeypatch)
        sampling: dict[str, Any] = {}
        first = await made.generate("a", prompt_ids=[1], sampling_params=sampling)
        return first, await made.generate("b", prompt_ids=[1], sampling_params=sampling)

    first, second = asyncio.run(main())
    tag = staleness.tag_of({"extra_fields": first.extra_fields})
    found = staleness.versions(tag, len(first.token_ids))
    assert found is not None
    assert found.tolist() == first.token_ids == [3] * 4 + [5] * 8, "an empty piece counts for nothing"
    assert (first.extra_fields["min_global_steps"], first.extra_fields["max_global_steps"]) == (3, 5)
    assert staleness.tag_of({"extra_fields": second.extra_fields}) == {"versions": [[6, 3]]}


def test_responses_at_the_same_time_are_not_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(3, 1, False), (4, 2, False), (5, 3, True), (6, 4, True)]

    async def main() -> list[Any]:
        made = client(Server(answers), monkeypatch)
        return await asyncio.gather(*(made.generate(name, prompt_ids=[1], sampling_params={}) for name in "ab"))

    found = asyncio.run(main())
    for output in found:
        listed = staleness.versions(staleness.tag_of({"extra_fields": output.extra_fields}), len(output.token_ids))
        assert listed is not None
        assert listed.tolist() == output.token_ids


def test_the_turns_of_a_conversation_are_noted_with_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As verl's agent loop with tools keeps of the extra fields what the first turn had."""

    async def main() -> dict[str, Any]:
        made = client(Server([(3, 2, True), (4, 3, True)]), monkeypatch)
        kept: dict[str, Any] = {}
        for _ in range(2):
            output = await made.generate("a", prompt_ids=[1], sampling_params={})
            kept = kept or dict(output.extra_fields)
        return kept

    assert staleness.tag_of({"extra_fields": asyncio.run(main())}) == {"versions": [[3, 2], [4, 3]]}


def test_other_clients_stay_as_they_are() -> None:
    from verl.workers.rollout.llm_server import LLMServerClient

    plain = LLMServerClient(SimpleNamespace())
    assert type(staleness.note_versions(plain)) is LLMServerClient


VOCABULARY = 11


class Queue:
    """The part of TransferQueue that scoring uses: rows of jagged fields by key."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        import torch
        from tensordict import TensorDict

        names = select_fields or list(self.rows[keys[0]])
        jagged = {
            name: torch.nested.as_nested_tensor([self.rows[key][name] for key in keys], layout=torch.jagged)
            for name in names
        }
        return TensorDict(jagged, batch_size=len(keys))

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any, tags: Any = None) -> Any:
        for name, values in fields.items():
            for key, value in zip(keys, values.unbind(), strict=True):
                self.rows.setdefault(key, {})[name] = value
        return SimpleNamespace(keys=keys, tags=tags, extra_info={})

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            del self.rows[key]


class Workers:
    """The trainer's workers, whose policy is a table [11] of log-probs for each version."""

    def __init__(self, queue: Queue, tables: Any) -> None:
        self.queue, self.tables, self.version = queue, tables, 0
        self.saved: dict[object, int] = {}
        self._dispatch_info = {"actor": [0, 1]}
        self.fails = False

    def save_model_to_cpu(self, name: object) -> None:
        self.saved[name] = self.version

    def restore_model_from_cpu(self, name: object) -> None:
        self.version = self.saved[name]

    def clear_cpu_model(self, name: object) -> None:
        del self.saved[name]

    def compute_log_prob(self, batch: Any) -> None:
        """As verl's: the output for a token stands at the token before it."""
        import torch

        if self.fails:
            raise RuntimeError("no memory")
        assert len(batch.keys) % 4 == 0
        for key in batch.keys:
            row = self.queue.rows[key]
            row["log_probs"] = self.tables[self.version][torch.cat([row["input_ids"][1:], row["input_ids"][:1]])]


@pytest.fixture
def stale_run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer in step 3, whose batch has responses of versions 0 and 1, and a queue with more of version 1."""
    import torch
    import transfer_queue
    from omegaconf import OmegaConf

    make = torch.Generator().manual_seed(1)
    tables = torch.log_softmax(torch.randn(4, VOCABULARY, generator=make), -1)
    noise = torch.randn(VOCABULARY, generator=make) * 0.1
    rows: dict[str, dict[str, Any]] = {}
    tags: dict[str, dict[str, Any]] = {}
    for number in range(12):
        key, size = f"u{number}_0_0", 20 + number
        pieces = [[0, 5], [1, size - 5]] if number % 2 else [[0, size]]
        response = torch.randint(VOCABULARY, (size,), generator=make)
        version = torch.from_numpy(staleness.versions({"versions": pieces}, size))
        rows[key] = {
            "input_ids": torch.cat([torch.tensor([1, 2]), response]),
            "response_mask": torch.ones(size, dtype=torch.int64),
            "rollout_log_probs": tables[version, response] + noise[response],
        }
        tags[key] = {"status": "success", "versions": pieces, "response_len": size}
    queue = Queue(rows)
    for name in ("kv_batch_get", "kv_batch_put", "kv_clear"):
        monkeypatch.setattr(transfer_queue, name, getattr(queue, name))
    workers = Workers(queue, tables)

    class Trainer:
        trainer_mode, global_steps, local_trigger_step, parameter_sync_step = "separate_async", 3, 0, 1
        actor_rollout_wg = workers
        replay_buffer = SimpleNamespace(partitions={"train": tags | {"u99_0_0": {"status": "running"}}})
        config = OmegaConf.create(
            {
                "algorithm": {"rollout_correction": {"rollout_is": "token", "rollout_is_threshold": 1.05}},
                "actor_rollout_ref": {
                    "rollout": {
                        "temperature": 1.0,
                        "log_prob_use_dynamic_bsz": False,
                        "log_prob_micro_batch_size_per_gpu": 2,
                    }
                },
            }
        )

        def step(self, *_: Any) -> None:
            keys = list(tags)[:4]
            self._compute_old_log_prob(SimpleNamespace(keys=keys, tags=[tags[key] for key in keys]), {})

        def _compute_old_log_prob(self, *_: Any) -> None:
            assert workers.version == self.global_steps - 1
            workers.save_model_to_cpu(0)

    trainer: Any = Trainer()
    staleness.watch(trainer)
    workers.version, trainer._kept, workers.saved[0] = 2, 1, 1
    return SimpleNamespace(trainer=trainer, workers=workers, rows=rows, tags=tags, noise=noise, tables=tables)


def test_responses_are_scored_again_by_the_policy_that_sampled_them(stale_run: Any) -> None:
    """Their tokens differ from it by the noise of the rollout alone."""
    metrics: dict[str, float] = {}
    stale_run.trainer.step(metrics, {})
    found = read_step(3, metrics)
    chosen = staleness.rows_to_score(stale_run.tags, 1, 4, seed=3)
    assert len(chosen) == 4, "of six, a multiple of what two processes take"
    assert all(len(stale_run.tags[key]["versions"]) == 2 for key in chosen)
    noise = np.concatenate([stale_run.noise[stale_run.rows[key]["input_ids"][7:]].numpy() for key in chosen])
    assert found["tokens@fresh"] == len(noise)
    assert found["kl@fresh"] == pytest.approx(noise.mean(), abs=1e-5)
    weights = np.minimum(np.exp(-noise), 1.05)
    assert found["weight_mean@fresh"] == pytest.approx(weights.mean(), rel=1e-5)
    assert found["truncated@fresh"] == pytest.approx((np.exp(-noise) > 1.05).mean())
    assert stale_run.workers.saved == {0: 2}
    assert set(stale_run.rows) == set(stale_run.tags), "the copies are gone"
    assert not any("log_probs" in row for row in stale_run.rows.values())


def test_they_are_scored_again_now_and_then(stale_run: Any) -> None:
    trainer, scored = stale_run.trainer, []
    for number in range(3, 3 + 2 * staleness.EVERY):
        trainer.global_steps, stale_run.workers.version = number, number - 1
        stale_run.workers.tables = stale_run.tables[0].expand(99, -1)
        trainer._kept, stale_run.workers.saved[0] = 1, 1
        metrics: dict[str, float] = {}
        trainer.step(metrics, {})
        if read_step(number, metrics)["tokens@fresh"]:
            scored.append(number)
        if number == 15:
            staleness._STEP.last_kl = 2 * staleness.FAR  # of that step's tokens
    assert scored == [3, 13, 16]


@pytest.mark.parametrize("why", ["fresh tokens", "first step", "later mini-batch", "other versions"])
def test_nothing_is_scored_again_without_need_or_weights(why: str, stale_run: Any) -> None:
    trainer = stale_run.trainer
    if why == "fresh tokens":
        next(iter(stale_run.tags.values())).update(versions=[[2, contract.ENOUGH]], response_len=contract.ENOUGH)
    elif why == "first step":
        trainer._kept = None
    elif why == "later mini-batch":
        trainer.local_trigger_step = 1
    else:
        trainer._kept = 7
    metrics: dict[str, float] = {}
    trainer.step(metrics, {})
    assert read_step(3, metrics).fresh == ""
    assert "tokens@fresh" not in read_step(3, metrics).values


def test_a_measurement_that_fails_ends_no_run(stale_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    stale_run.workers.fails = True
    contract.logger().addHandler(caplog.handler)
    try:
        stale_run.trainer.step({}, {})
    finally:
        contract.logger().removeHandler(caplog.handler)
    assert "no response is scored again: RuntimeError: no memory" in caplog.text
    assert (stale_run.workers.saved, set(stale_run.rows)) == ({0: 2}, set(stale_run.tags))
