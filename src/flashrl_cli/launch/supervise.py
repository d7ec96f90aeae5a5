"""Run a launch plan: start it, watch log, metrics and proof, show what happens, and leave nothing behind.

verl waits for ever when a vLLM worker dies, and goes on when the rollout engine is broken. So the run is ended here: on a
failure that the log shows, on lost or implausible metrics, on a precision that is not proven, and when nothing moves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from flashrl_cli import files
from flashrl_cli.errors import EnvironmentNotReady, ExitCode, FlashrlError, RunFailed
from flashrl_cli.launch import proof
from flashrl_cli.launch.guard import broken_rollout
from flashrl_cli.launch.plan import LaunchPlan, plan_document
from flashrl_cli.launch.process import Tree
from flashrl_cli.runs.metrics import MetricsTail
from flashrl_cli.runs.tail import Tail, last_lines
from flashrl_cli.verl.log_lines import CAUSES, Cause, cause_in, phase_after, plain, total_steps

if TYPE_CHECKING:
    from flashrl_cli.contract import Handshake
    from flashrl_cli.verl.metrics import StepMetrics

POLL_S = 0.2
TAIL_LINES = 20


class Display(Protocol):
    """Who is told what happens."""

    def expect(self, total: int) -> None:
        """The run will have `total` steps."""

    def phase(self, text: str) -> None:
        """Something else is being done now."""

    def proven(self, shakes: list[Handshake]) -> None:
        """The rollout workers proved their precision."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def tick(self) -> None:
        """Time passes."""


class Interrupted(FlashrlError):
    """A signal ended the run; the exit code is the signal's."""

    def __init__(self, number: int, hint: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}", hint=hint)
        self.exit_code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED


@dataclass
class Watch:
    """One attempt under way: what was seen of it so far."""

    plan: LaunchPlan
    display: Display
    tree: Tree
    vocabulary: int | None
    steps: int = 0
    """Training steps done in this attempt."""

    def __post_init__(self) -> None:
        self._log = Tail(self.plan.attempt_paths.log)
        self._metrics = MetricsTail(self.plan.attempt_paths.metrics)
        self._expected = proof.expectation(self.plan)
        self._proven = self._expected.workers == 0
        self._moved = time.monotonic()
        self._phase: str | None = None
        self._doomed: tuple[Cause, float] | None = None
        self.cause: Cause | None = None

    def look(self, *, ended: bool = False) -> None:
        """Take in what happened since the last look; raises what ends the run. `ended`: nothing more will be written."""
        for line in self._log.poll(ended=ended):
            self._read(plain(line))
        self._prove()
        for step in self._metrics.poll():
            self._judge(step)
        self._check_clocks()
        self.tree.processes()
        self.display.tick()

    def _read(self, line: str) -> None:
        phase = phase_after(line)
        if phase is not None and phase != self._phase and not self.steps:
            self._phase = phase
            self._moved = time.monotonic()
            self.display.phase(phase)
        total = total_steps(line)
        if total is not None:
            self.display.expect(total)
        cause = cause_in(line)
        if cause is None:
            return
        # the more specific the cause, the earlier it stands
        self.cause = min(self.cause or cause, cause, key=CAUSES.index)
        if cause.fatal and self._doomed is None:
            self._doomed = (cause, time.monotonic())

    def _prove(self) -> None:
        if self._proven:
            return
        shakes = proof.read(self.plan.attempt_paths.plugins)
        refuted = proof.refutation(self._expected, shakes)
        if refuted:
            raise EnvironmentNotReady(
                refuted, hint="`flashrl train --rollout bf16` trains without; the log says what vLLM loaded"
            )
        if len(shakes) >= self._expected.workers:
            self._proven = True
            self.display.proven(shakes)

    def _judge(self, step: StepMetrics) -> None:
        self._moved = time.monotonic()
        self.display.step(step)
        if step.step == 0:
            return
        self.steps += 1
        self._doomed = None  # whatever the log said, the run goes on
        self._prove()
        if not self._proven:
            reason = proof.missing(self._expected, proof.read(self.plan.attempt_paths.plugins))
            raise EnvironmentNotReady(str(reason), hint="are flashrl's plugins installed on every node?")
        if step.lost:
            raise RunFailed(
                f"step {step.step}: NaN in {', '.join(step.lost)}", hint="lower the learning rate, or try bf16 rollouts"
            )
        broken = broken_rollout(step, self.plan.spec.watch, self.vocabulary)
        if broken:
            raise EnvironmentNotReady(
                f"step {step.step}: the rollout engine does not sample from the policy: {broken}",
                hint="this is no mismatch for TIS to correct; `--rollout bf16` tells whether quantization is at fault",
            )

    def _check_clocks(self) -> None:
        watch, now = self.plan.spec.watch, time.monotonic()
        if self._doomed and now - self._doomed[1] > watch.failure_grace_s:
            raise RunFailed(self._doomed[0].what, hint=self._doomed[0].hint)
        limit = watch.step_timeout_s if self.steps else watch.start_timeout_s
        if now - self._moved > limit:
            doing = "a step" if self.steps else "the start"
            raise RunFailed(
                f"no progress for {limit:g} s during {doing}",
                hint=f"raise watch.{'step' if self.steps else 'start'}_timeout_s if it only is slow",
            )


def supervise(plan: LaunchPlan, display: Display, *, vocabulary: int | None = None) -> int:
    """Execute `plan` to its end and return the number of steps done; nothing of it runs any more afterwards.

    `vocabulary` is the policy's number of tokens, if known. Raises RunFailed, EnvironmentNotReady or Interrupted with the log's end.
    """
    paths = plan.attempt_paths
    paths.plugins.mkdir(parents=True)
    files.write_json(paths.plan, plan_document(plan))
    display.phase("starting verl")
    with _signals() as received:
        tree = Tree(plan.argv, env={**os.environ, **plan.env}, cwd=plan.cwd, log=paths.log)
        watch = Watch(plan, display, tree, vocabulary)
        try:
            _follow(watch, received)
        except (RunFailed, EnvironmentNotReady) as error:
            raise type(error)(_with_log(error.message, plan), hint=error.hint) from error
        finally:
            _end(tree, plan, received)
    return watch.steps


def _follow(watch: Watch, received: list[int]) -> None:
    while True:
        code = watch.tree.poll()
        watch.look(ended=code is not None)
        if received:
            log = watch.plan.attempt_paths.log
            raise Interrupted(received[0], hint=f"go on with `--resume auto --name {watch.plan.name}`; log: {log}")
        if code == 0 and watch.steps:
            return
        if code == 0:
            raise RunFailed("verl ended without a step", hint="a finished run goes on with a larger trainer.steps")
        if code is not None:
            cause = watch.cause
            raise RunFailed(
                cause.what if cause else f"verl ended with exit code {code}",
                hint=cause.hint if cause else "the log's end says why",
            )
        time.sleep(POLL_S)


def _end(tree: Tree, plan: LaunchPlan, received: list[int]) -> None:
    """End what still runs; a second signal meanwhile makes short work of it."""
    if tree.poll() is None and len(received) < 2:
        tree.terminate()
        deadline = time.monotonic() + plan.spec.watch.stop_grace_s
        while tree.poll() is None and time.monotonic() < deadline and len(received) < 2:
            tree.processes()
            time.sleep(POLL_S)
    tree.kill(grace_s=0.0 if len(received) > 1 else 3.0)


def _with_log(message: str, plan: LaunchPlan) -> str:
    log = plan.attempt_paths.log
    tail = [line for line in map(plain, last_lines(log, 200)) if line][-TAIL_LINES:]
    return "\n".join([message, *(f"  | {line[:300]}" for line in tail), f"log: {log}"])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect INT, TERM and HUP in the list it yields, instead of dying of them."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
