"""`flashrl train --executor ray` on a real Ray cluster of two nodes, INT8 rollouts and TIS on both."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flashrl_cli.contract import read_handshakes
from flashrl_cli.paths import AttemptPaths
from flashrl_cli.plugins.log_ratios import file_of
from flashrl_cli.runs import store
from flashrl_cli.runs.metrics import read_metrics
from flashrl_cli.train.executors.ray_job import LogExtraction
from tests.integration.conftest import PATIENCE_S, SMALL, Workshop, events
from tests.integration.ray_cluster import HEAD, OTHER, Cluster, two_nodes

STEPS = 1
OF_TWO_NODES = (
    *SMALL,
    *("--rollout", "int8", "--tis", "2", "--set", "resources.nodes=2", "--set", "trainer.save_every=1"),
)
WORKERS = re.compile(r"^(ray::(?!IDLE|DashboardAgent|RuntimeEnvAgent)|VLLM)")
"""Titles of a run's processes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


def train(cluster: Cluster, name: str, *more: str) -> tuple[str, ...]:
    words = ("train", "--preset", "tiny", "--executor", "ray", "--ray-address", cluster.address, "--json")
    return (*words, "--name", name, *OF_TWO_NODES, *more)


def run(workshop: Workshop, cluster: Cluster, *words: str, code: int = 0) -> tuple[str, str]:
    process = workshop.start(*words, **cluster.env)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, f"{out[-3000:]}\n{err[-6000:]}"
    return out, err


def workers(cluster: Cluster) -> list[str]:
    """Processes of runs on the cluster."""
    found = []
    for process in cluster.processes(HEAD) | cluster.processes(OTHER):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if WORKERS.match(title):
            found.append(f"{process.pid} {title}")
    return found


def none_left(cluster: Cluster, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := workers(cluster):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def the_log_tells_the_same(attempt: AttemptPaths, relayed: AttemptPaths) -> None:
    """Where no folder is shared, metrics, handshakes and log-ratios come out of the log: the same ones."""
    relayed.log.write_bytes(attempt.log.read_bytes())
    LogExtraction(relayed).poll(ended=True)
    assert read_metrics(relayed.metrics)[:STEPS] == read_metrics(attempt.metrics)[:STEPS]
    assert list(read_handshakes(relayed.plugins)) == list(read_handshakes(attempt.plugins))
    first, second = (file_of(one.log_ratios, 1).read_bytes() for one in (relayed, attempt))
    assert first == second, "the step is small enough to be printed as it is"


def test_a_cluster_that_is_too_small(workshop: Workshop, cluster: Cluster) -> None:
    words = train(cluster, "large", "--set", "resources.nodes=3", "--set", "data.train_batch_size=48")
    words += ("--set", "algorithm.mini_batch_size=24")
    _, err = run(workshop, cluster, *words, code=3)
    assert f"it needs 3 nodes with 1 free GPU and 3 free CPUs each; {HEAD}: 1 of 1 GPUs" in err
    assert not (workshop.root / "runs/large").exists()


def job_of(workshop: Workshop, name: str) -> str | None:
    """The Ray job of a run's newest attempt, once it is submitted."""
    found = store.load(workshop.root / "runs" / name / "run.json")
    return found.last.job_id if found and found.last else None


def test_ctrl_c_stops_the_job(workshop: Workshop, cluster: Cluster) -> None:
    process = workshop.start(*train(cluster, "stopped", "--set", "trainer.steps=500"), **cluster.env)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not job_of(workshop, "stopped"):  # early is enough: the moments of a start are the local test's
            assert process.poll() is None, process.communicate()[1][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130, err[-4000:]
    last = json.loads((workshop.root / "runs/stopped/run.json").read_text())["attempts"][-1]
    assert last["status"] == "stopped"
    none_left(cluster, 120)


def test_two_nodes_train_together_until_one_is_lost(workshop: Workshop, cluster: Cluster, tmp_path: Path) -> None:
    """Two INT8 proofs and a checkpoint of two ranks, with a reward function of the user's; then a node is killed in
    mid-run, and the run ends with that message.
    """
    attempt = AttemptPaths(workshop.root / "runs/two/attempt_1")
    (workshop.root / "reward.py").write_text("def score(solution_str):\n    return 0.3 + 0.01 * len(solution_str)\n")
    sets = ("trainer.steps=500", "env.FLASHRL_TELL=1", "reward.function=reward.py:score")
    words = (word for text in sets for word in ("--set", text))
    process = workshop.start(*train(cluster, "two", *words), **cluster.env)
    try:
        wait_for_step(STEPS, attempt, process)
        cluster.lose(OTHER)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 1, err[-4000:]
    assert f"error: the Ray cluster lost node {OTHER}" in err
    step = json.loads(attempt.metrics.read_text().splitlines()[0])["data"]
    assert 0.3 <= step["critic/score/min"] < step["critic/score/max"] < 0.3 + 0.01 * 64
    assert "hint: `--resume auto` goes on from the newest checkpoint" in err
    assert [event["step"] for event in events(out, "step")][:STEPS] == list(range(1, STEPS + 1))
    handshakes = list(read_handshakes(attempt.plugins))
    assert [(handshake.precision, handshake.quantized_layers > 0) for handshake in handshakes] == [("int8", True)] * 2
    saved = workshop.root / "checkpoints/tiny/two" / f"global_step_{STEPS}/actor"
    assert sorted(path.name for path in saved.glob("model_*")) == [
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    ]
    last = json.loads((workshop.root / "runs/two/run.json").read_text())["attempts"][-1]
    assert (last["status"], last["executor"], last["ray_address"]) == ("failed", "ray", cluster.address)
    assert len(last["proof"]) == 2
    none_left(cluster, 120)
    the_log_tells_the_same(attempt, AttemptPaths(tmp_path))


def wait_for_step(number: int, attempt: AttemptPaths, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(metrics.step == number for metrics in read_metrics(attempt.metrics)):
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, attempt.log.read_text(errors="replace")[-4000:]
        time.sleep(0.5)
