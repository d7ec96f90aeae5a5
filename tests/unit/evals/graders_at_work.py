"""A script, `graders_at_work.py OUT RESPONSE…`: two graders and a verl of a few lines grade responses, into OUT.

A response is what the scorer then does, see VERL; `@N` in front makes N copies of it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

VERL = r"""
import multiprocessing, os, re, signal, sys, time

def default_compute_score(source, response, truth, extra):
    print("noise on stdout"); print("noise on stderr", file=sys.stderr)
    if response == "hang":  # in C, with the GIL
        re.match("(a+)+$", "a" * 50 + "b")
    if response == "sleep":
        time.sleep(600)
    if response == "fork":  # a child that outlives whoever does not end it
        multiprocessing.Process(target=time.sleep, args=(600,)).start()
        time.sleep(600)
    if response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "raise":
        raise ValueError("no such brace")
    if response == "lacks":
        raise ImportError("No module named 'pylatexenc'")
    return float(response == truth)
"""


def write_packages(folder: Path) -> None:
    """`verl` with VERL as its scorer, and a `math_verify` that nothing here needs."""
    (folder / "math_verify").mkdir(parents=True)
    (folder / "math_verify/__init__.py").write_text("")
    package = folder / "verl/utils/reward_score"
    package.mkdir(parents=True)
    for parent in (package.parent, package.parent.parent):
        (parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(VERL)


def main() -> None:
    from flashrl_cli.evals import graders
    from flashrl_cli.evals.questions import Question
    from flashrl_cli.evals.results import Response

    out, *words = sys.argv[1:]
    graders.LIMIT_S, graders._CHUNK_LIMIT_S, graders._BY_THE_CLOCK = 1.0, 0.5, 12
    texts = [text for word in words for text in _copies(word)]
    question = Question([], "codecontests", "right", None)
    responses = [Response(question=0, sample=n, response=text, tokens=1, cut=False) for n, text in enumerate(texts)]
    with graders.Graders(workers=2) as pool:
        if os.environ.get("KILL_IDLE"):
            pool.grade([question], responses[:1])
            _kill_graders()
        threading.Timer(0.5, lambda: print("grading", flush=True)).start()
        grades = pool.grade([question], responses)
    Path(out).write_text(json.dumps([asdict(grade) for grade in grades]), encoding="utf-8")


def _copies(word: str) -> list[str]:
    if not word.startswith("@"):
        return [word]
    count, _, text = word[1:].partition(":")
    return [text] * int(count)


def _kill_graders() -> None:
    import psutil

    started = psutil.Process().children()
    for grader in (one for server in started for one in server.children()):
        grader.kill()
    time.sleep(0.5)


if __name__ == "__main__":
    main()
