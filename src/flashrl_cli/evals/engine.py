"""The process that holds the model: `python -m flashrl_cli.evals.engine JOB.json`.

One vLLM engine serves all checkpoints of a job. It runs apart from the command line so that torch and vLLM are imported
once, here, and so that everything it starts can be ended as one process group. It ends when the other end of its stdin
closes: a command line that was killed leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashrl_cli.errors import ExitCode, FlashrlError
from flashrl_cli.evals import grade, merge
from flashrl_cli.evals.job import Job, Target, read_lines

Emit = Callable[..., None]


def main() -> None:
    """Work through the job named on the command line, telling its progress on stdout."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.excepthook = _end_with_traceback
    emit = _events()
    try:
        _evaluate(Job.read(Path(sys.argv[1])), emit)
    except FlashrlError as error:
        emit("error", kind=type(error).__name__, message=error.message, hint=error.hint)
        os._exit(ExitCode.FAILED)
    os._exit(ExitCode.OK)  # taking vLLM down politely takes seconds, and nothing of it is needed any more


def _evaluate(job: Job, emit: Emit) -> None:
    questions = list(read_lines(job.questions))
    emit("stage", text="importing vLLM and verl")
    from flashrl_cli.evals.generate import Generator

    grade.check_sources(questions)
    generator: Generator | None = None
    for target in job.targets:
        try:
            with _hf_folder(target, job.work) as folder:
                if generator is None:
                    emit("stage", text="starting the vLLM engine")
                    generator = Generator(folder, job, [q["prompt"] for q in questions])
                started = time.perf_counter()
                emit("loaded", index=target.index, holds=generator.load(folder))
                answers = generator.answer(folder, lambda n: emit("advance", prompts=n))
        except merge.Unreadable as error:
            emit("skipped", index=target.index, reason=str(error))
            continue
        _write(job.responses(target.index), questions, answers)
        emit("done", index=target.index, seconds=round(time.perf_counter() - started, 3))


@contextlib.contextmanager
def _hf_folder(target: Target, work: Path) -> Iterator[Path]:
    """The target as an HF folder: its own, or merged from its shards and removed afterwards."""
    if not target.shards:
        yield merge.check(Path(target.hf))
        return
    import tempfile

    with tempfile.TemporaryDirectory(dir=work, prefix="merged-") as parent:
        yield merge.merge(Path(target.hf), [Path(s) for s in target.shards], Path(parent) / "hf")


def _write(path: Path, questions: list[dict[str, Any]], answers: list[list[dict[str, Any]]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for number, (question, samples) in enumerate(zip(questions, answers, strict=True)):
            for sample, answer in enumerate(samples):
                points, correct = grade.score(question, answer["response"])
                line = {"question": number, "sample": sample, **answer, "score": points, "correct": correct}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _events() -> Emit:
    """Keep stdout for events, and send what libraries print there to stderr, which is the log."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **data: Any) -> None:
        stream.write(json.dumps({"event": event, **data}) + "\n")
        stream.flush()

    return emit


def _end_with_traceback(*error: Any) -> None:
    """A failure ends the process at once: what vLLM has started might hold it for ever."""
    sys.__excepthook__(*error)
    os._exit(ExitCode.FAILED)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
