"""A stranger's CSV of questions and answers: prepared, trained on with another data set and evaluated."""

from __future__ import annotations

import csv
import json

from flashrl_cli.data.arith import pairs, question, solution
from tests.integration.conftest import SMALL, Workshop, events, more_than_guessed

SHORT = ("--set", "trainer.steps=2", "--set", "trainer.save_every=2")


def test_a_csv_of_questions_and_answers(workshop: Workshop) -> None:
    """The answers are worked sums, which the tiny policy writes letter for letter if it knows them: exact text."""
    with (workshop.root / "sums.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(("topic", "question", "worked"))
        table.writerows(("sums", question(*pair), solution(*pair)) for pair in pairs(0)["train"][:400])

    columns = ("--source", "sums.csv", "--map", "prompt=question,answer=worked", "--reward", "exact")
    workshop.run("prepare", "sums", *columns)
    data = ("--set", "data.train=[sums,tiny]", "--set", "data.shares=[3,1]", "--set", "data.val=sums")
    trained, _ = workshop.run("train", "--preset", "tiny", "--name", "own", *data, *SHORT, *SMALL, "--json")
    log = (workshop.root / "runs/own/attempt_1/driver.log").read_text(encoding="utf-8")
    evaluated, _ = workshop.run("eval", "checkpoints/tiny/own", "--max-tokens", 16, "--json")

    rows = {"sums": (12288, 380), "tiny": (4096, 4096)}
    for name, (epoch, count) in rows.items():
        assert f"data set: {epoch} rows an epoch of the {count} in {workshop.root}/data/{name}/train.parquet" in log
    steps = events(trained, "step")
    assert [step["step"] for step in steps] == [1, 2]
    assert more_than_guessed(sum(step["reward"] for step in steps) * 64, 2 * 64), "each step scores 16 x 4 responses"
    [result] = json.loads(evaluated)["results"]
    assert (result["dataset"], result["prompts"]) == ("sums", 20)
    assert more_than_guessed(result["accuracy"] * 20, 20)
