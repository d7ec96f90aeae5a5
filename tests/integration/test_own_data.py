"""A stranger's CSV of questions and answers: prepared, trained on with other data sets and evaluated."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

from flashrl_cli.data.arith import pairs, question, solution
from tests.integration.conftest import SMALL, Workshop, events, more_than_guessed

SHORT = ("--set", "trainer.steps=2", "--set", "trainer.save_every=2", "--set", "data.max_prompt_length=128")
REWARD = """
def score(solution_str, ground_truth, extra_info):
    assert extra_info["topic"] == "sums"
    response = solution_str.strip()
    if response == ground_truth:
        return 1.0
    same = response.rpartition(" ")[2] == ground_truth.rpartition(" ")[2]
    return 0.75 if same else 0.0
"""
GYM = find_spec("reasoning_gym") is not None
"""reasoning-gym is an extra, which the test tools bring."""


def test_a_csv_of_questions_and_answers_and_a_reward(workshop: Workshop) -> None:
    """The answers are worked sums, which the tiny policy writes if it knows them; the reward takes other workings, too.

    Another data set in the batch is the tiny policy's own, and a third is generated and scored by reasoning-gym.
    """
    with (workshop.root / "sums.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(("topic", "question", "worked"))
        table.writerows(("sums", question(*pair), solution(*pair)) for pair in pairs(0)["train"][:400])

    (workshop.root / "mine.py").write_text(REWARD, encoding="utf-8")

    columns = ("--source", "sums.csv", "--map", "prompt=question,answer=worked", "--reward", "mine.py:score")
    workshop.run("prepare", "sums", *columns)
    names, shares, rows = "[sums,tiny]", "[3,1]", {"sums": (12288, 380), "tiny": (4096, 4096)}
    if GYM:
        workshop.run("prepare", "rg:chain_sum,spell_backward", "--rows", 100, "--prompt-template", "{prompt}")
        names, shares = "[sums,tiny,rg-chain_sum-spell_backward]", "[3,1,0.5]"
    data = ("--set", f"data.train={names}", "--set", f"data.shares={shares}", "--set", "data.val=sums")
    trained, _ = workshop.run("train", "--preset", "tiny", "--name", "own", *data, *SHORT, *SMALL, "--json")
    log = (workshop.root / "runs/own/attempt_1/driver.log").read_text(encoding="utf-8")
    also = ("--dataset", "sums,rg-chain_sum-spell_backward") if GYM else ()
    evaluated, _ = workshop.run("eval", "checkpoints/tiny/own", *also, "--max-tokens", 16, "--json")

    for name, (epoch, count) in rows.items():
        assert f"data set: {epoch} rows an epoch of the {count} in {workshop.root}/data/{name}/train.parquet" in log
    assert ("rows an epoch of the 95 in" in log) == GYM
    steps = events(trained, "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert more_than_guessed(sum(step["reward"] for step in steps) * 64, 2 * 64), "each step scores 16 x 4 responses"
    [result, *others] = json.loads(evaluated)["results"]
    assert (result["dataset"], result["prompts"]) == ("sums", 20)
    assert more_than_guessed(result["accuracy"] * 20, 20)
    assert [(other["dataset"], other["problems"]) for other in others] == [("rg-chain_sum-spell_backward", 0)] * GYM
