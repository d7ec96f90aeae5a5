"""`flashrl train` on the real stack: verl, Ray and vLLM, INT8 rollouts and TIS, with a policy that knows something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashrl_cli import contract
from flashrl_cli.contract import Handshake, read_handshakes
from flashrl_cli.plugins import log_ratios
from tests.integration.conftest import SMALL, Workshop, events, more_than_guessed

INT8 = ("--rollout", "int8", "--tis", "2")


def check_proof(out: str, attempt: Path) -> None:
    """Every linear layer of the policy is INT8, by vLLM's own kernel, again after every refit."""
    (handshake,) = read_handshakes(attempt / "plugins")
    assert (handshake.precision, handshake.quantized_layers, handshake.linear_layers) == ("int8", 8, 8)
    # per layer of the policy: qkv 3 x 128², o 128², gate and up 2 x 128 x 256, down 128 x 256
    assert handshake.quantized_bytes == 2 * (4 * 128 * 128 + 3 * 128 * 256)
    assert "Int8" in handshake.kernel
    assert handshake.rotation == 128, "inputs have 128 and 256 channels"
    assert handshake.refits >= 2
    assert handshake.received == "bfloat16", "the trainer's weights are float32, and cast before they are sent"
    assert events(out, "proof")[0]["workers"][0]["precision"] == "int8"
    check_arrival(handshake, events(out, "step")[-1])


def check_arrival(handshake: Handshake, step: dict[str, float]) -> None:
    """The last step logged what its weight update changed in the engine, on average as much as in the trainer."""
    figures = handshake.arrival or {}
    assert figures["sampled"] == handshake.quantized_bytes, "so small a policy is compared in full"
    assert 0 < figures["codes_changed"] < figures["weights_changed"] <= 1
    # rounding to the nearest code is right on average over many weights
    assert 0.9 < figures["arrived"] < 1.1
    assert {name: step[name] for name in contract.ARRIVAL} == {name: figures[name] for name in contract.ARRIVAL}


def check_plausible(steps: list[dict[str, float]], responses: int) -> None:
    """The rollout samples from the policy: it solves sums, and INT8 is no bf16.

    That both nearly agree is the run's own watch's.
    """
    for step in steps:
        assert more_than_guessed(step["reward"] * responses, responses)
        assert step["weight_max"] <= 2
        assert step["prob_diff"] > 0
        assert step["grad_norm"] > 0


def check_evaluation(workshop: Workshop, checkpoints: Path, runs: Path, steps: int) -> None:
    """Every saved step is found, merged, loaded into one engine and graded; the tiny policy solves some sums."""
    base = workshop.root / "data" / "tiny" / "model"
    words = (
        "eval",
        f"{checkpoints}/*",
        "--base",
        base,
        "--temperature",
        1,
        "--max-tokens",
        16,
        "--limit",
        128,
        "--json",
    )
    out, _ = workshop.run(*words, FLASHRL_RUNS=str(runs))
    document = json.loads(out)
    assert [row["step"] for row in document["results"]] == list(range(steps + 1))
    assert all(row["n"] == 128 and more_than_guessed(row["accuracy"] * 128, 128) for row in document["results"])
    assert document["datasets"][0]["file"] == str(workshop.root / "data" / "tiny" / "test.parquet")


def check_kept(workshop: Workshop, name: str, step: dict[str, float]) -> None:
    """The kept log-ratios of a step's responses have the moments that verl logged of all, and are replayed."""
    attempt = workshop.root / "runs" / name / "attempt_1"
    kept = log_ratios.read(log_ratios.file_of(attempt / "log_ratios", 1))
    assert len(kept.lengths) == kept.responses
    ratios = kept.log_ratios.astype(float)
    # float16 rounds each by 2^-11 of its size at most
    within = abs(ratios).mean() / 2**11
    assert abs(-ratios.mean() - step["kl"]) <= within + 1e-7
    assert abs(ratios).max() > 0
    assert kept.advantages.any()
    document = json.loads(workshop.run("runs", "correction", name, "--json")[0])
    assert (document["own"], document["responses"]["kept"], document["tokens"]) == (
        "tis 2",
        kept.responses,
        len(ratios),
    )
    own = next(row for row in document["corrections"] if row["name"] == "tis 2")
    assert own["mean"] == pytest.approx(step["weight_mean"], abs=1e-4)
    assert own["effective"] == pytest.approx(step["effective"], abs=1e-4)


def test_a_broken_refit_stops_the_run(workshop: Workshop, tmp_path: Path) -> None:
    """An engine left on its dummy weights looks healthy to everything but the comparison with the trainer."""
    (tmp_path / "broken_refit.py").write_text(Path(__file__).with_name("broken_refit.py").read_text())
    _, err = workshop.run(
        "train", "--preset", "tiny", *INT8, *SMALL, "--name", "broken",
        code=3, PYTHONPATH=str(tmp_path), VERL_USE_EXTERNAL_MODULES="broken_refit",
    )  # fmt: skip
    assert "step 1: the rollout engine does not sample from the policy" in err
    assert not workshop.leftovers()


def test_gsm8k_through_ppo_with_a_critic(workshop: Workshop, gsm8k: Path) -> None:
    """GSM8K itself: prepare, validate some prompts, a step of PPO with GAE and INT8 rollouts, save.

    The path counts, not the reward. Two agent loop workers are forks that call the same actor at once.
    """
    workshop.run("prepare", "gsm8k", "--source", gsm8k)
    short = ("--set", "trainer.steps=1", "--set", "trainer.save_every=1")
    few = ("--set", "trainer.validate_before=true", "--set", "verl.data.val_max_samples=8")
    two = ("--set", "verl.actor_rollout_ref.rollout.agent.num_workers=2")
    out, err = workshop.run("train", "--preset", "gsm8k-tiny-cpu", *INT8, *short, *few, *two, "--name", "ppo", "--json")
    assert "validation: 8 prompts of gsm8k before step 1" in err
    doing = [event["doing"] for event in events(out, "phase")]
    assert doing[-2:] == ["validating the starting policy: 8 prompts of gsm8k", "sampling responses"]
    validated, step = events(out, "step")
    assert (validated["step"], validated["accuracy"] is None) == (0, False)
    assert {"critic", "values", "actor", "refit"} <= step["seconds"].keys()
    assert events(out, "proof")[0]["workers"][0]["precision"] == "int8"
    saved = workshop.root / "checkpoints" / "gsm8k-tiny-cpu" / "ppo" / "global_step_1"
    assert (saved / "critic").is_dir()
    log = (workshop.root / "runs" / "ppo" / "attempt_1" / "driver.log").read_text(encoding="utf-8")
    assert "all processes start without the fork server" not in log
    check_kept(workshop, "ppo", step)
    assert not workshop.leftovers()
