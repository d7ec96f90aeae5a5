"""Execute a launch plan: start it, watch log, metrics and handshakes, show progress, and leave no process behind.

verl waits forever when a vLLM worker dies, and continues when the rollout engine is broken. The run is therefore ended
here on a failure that the log shows, on lost or implausible metrics, on a precision that is not proven, and when no
progress is made.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashrl_cli import contract, files
from flashrl_cli.errors import EnvironmentNotReady, RunFailed
from flashrl_cli.files import last_lines
from flashrl_cli.plugins import reward
from flashrl_cli.runs.metrics import MetricsTail, Tail
from flashrl_cli.signals import Interrupted
from flashrl_cli.train import handshake, rewards
from flashrl_cli.train.plan import plan_document
from flashrl_cli.train.rewards import RewardFailed
from flashrl_cli.verl.causes import CAUSES, Cause, cause_in
from flashrl_cli.verl.environment import shipped
from flashrl_cli.verl.logs import StartPhase, notable, phase_after, plain, root_error, total_steps
from flashrl_cli.verl.metrics import AT, ENOUGH, dropped, dropped_in_words

if TYPE_CHECKING:
    from flashrl_cli.config.spec import CorrectionKind, CorrectionSpec, WatchSpec
    from flashrl_cli.contract import Handshake
    from flashrl_cli.runs.control import Display
    from flashrl_cli.train.plan import LaunchPlan
    from flashrl_cli.train.process import Handle, Start
    from flashrl_cli.verl.metrics import StepMetrics

POLL_S = 0.2
CONSTANT_STEPS = 3
"""Number of steps in a row with one reward for all responses after which a run is warned of."""
FAILURE_GRACE_S = 10.0
"""Seconds that verl gets to end after a failure, when there is nothing left to save."""
KILL_GRACE_S = 3.0
"""Seconds that the processes that verl left behind get to end, once verl itself has ended."""
TAIL_LINES = 20
TRACEBACK_LINES = 2000
"""Number of lines at the end of the log in which the root exception of a failure is searched."""


def supervise(
    plan: LaunchPlan,
    display: Display,
    received: list[int],
    *,
    start: Start,
    vocabulary: int | None = None,
    validates: str = "",
) -> int:
    """Execute `plan` to its end and return the number of steps done; no process of it is left afterwards.

    `received` is a list that grows by each signal received (`signals.collected`); `vocabulary` is the policy's number
    of tokens, if known; `validates` says what a validation generates, for those who wait for it. Raises RunFailed,
    EnvironmentNotReady or Interrupted with the end of the log.
    """
    paths = plan.attempt_paths
    paths.plugins.mkdir(parents=True)
    files.write_json(paths.plan, plan_document(plan))
    if plan.reward:
        files.write_text(paths.reward, plan.reward.text)
    display.phase(StartPhase.VERL.words)
    handle = start(plan)
    watch = Watch(plan, display, handle, vocabulary, validates)
    try:
        _follow(watch, received)
    except RewardFailed:
        raise  # of the user's function, about which the end of verl's log says nothing
    except (RunFailed, EnvironmentNotReady) as error:
        raise type(error)(_with_log(error.message, plan), hint=error.hint) from error
    finally:
        _end(handle, plan.spec.watch.stop_grace_s if received else FAILURE_GRACE_S, received)
    return watch.steps


def _follow(watch: Watch, received: list[int]) -> None:
    while True:
        code = watch.handle.poll()
        watch.look(ended=code is not None)
        if received:
            log = watch.plan.attempt_paths.log
            raise Interrupted(received[0], hint=f"go on with `--resume auto --name {watch.plan.name}`; log: {log}")
        if code == 0:
            return _check_complete(watch)
        if code is not None:
            what, hint = (watch.cause.what, watch.cause.hint) if watch.cause else (None, "the log's end says why")
            raise watch.failure(what, hint, f"verl ended with exit code {code}")
        time.sleep(POLL_S)


def _check_complete(watch: Watch) -> None:
    """Raise RunFailed for a run that ended before its last step with exit code 0, as verl does after its last epoch."""
    if not watch.steps:
        raise RunFailed("verl ended without a step", hint="a finished run goes on with a larger trainer.steps")
    if watch.total is not None and watch.last < watch.total:
        raise RunFailed(
            f"verl ended after step {watch.last} of {watch.total}",
            hint="trainer.epochs ends a run too: raise it, or lower trainer.steps",
        )


def _end(handle: Handle, grace_s: float, received: list[int]) -> None:
    """Ask the remaining processes to end, and kill them after `grace_s`, or at once on a second signal."""
    if handle.poll() is None and len(received) < 2:
        handle.terminate()
        deadline = time.monotonic() + grace_s
        while handle.poll() is None and time.monotonic() < deadline and len(received) < 2:
            handle.tend()
            time.sleep(POLL_S)
    handle.kill(grace_s=0.0 if len(received) > 1 else KILL_GRACE_S)


def _with_log(message: str, plan: LaunchPlan) -> str:
    log = plan.attempt_paths.log
    tail = notable(last_lines(log, 200))[-TAIL_LINES:]
    return "\n".join([message, *(f"  | {line[:300]}" for line in tail), f"log: {log}"])


@dataclass
class Watch:
    """One attempt under way: what has been seen of it so far."""

    plan: LaunchPlan
    display: Display
    handle: Handle
    vocabulary: int | None
    validates: str = ""
    """What a validation generates, in words."""
    steps: int = 0
    """Training steps done in this attempt."""
    last: int = 0
    """Number of the last training step."""
    total: int | None = None
    """Total number of training steps of the run, as verl counts them."""

    def __post_init__(self) -> None:
        self._log = Tail(self.plan.attempt_paths.log)
        self._metrics = MetricsTail(self.plan.attempt_paths.metrics)
        self._expected = handshake.expectation(self.plan)
        self._proven = self._expected.workers == 0
        self._moved = time.monotonic()
        self._phase = StartPhase.VERL
        self._doomed: tuple[Cause, float] | None = None
        self.cause: Cause | None = None
        self._constant = 0
        self._stale = False
        self._dropped: Counter[str] = Counter()
        self._warned = 0
        own = self.plan.reward and shipped(self.plan.spec, self.plan.attempt_paths)
        self._frozen = reward.Frozen(own) if own else None
        self._report: reward.Report | None = None

    @property
    def _complete(self) -> bool:
        """Whether the last step is done, after which verl only ends its processes."""
        return self.total is not None and self.last >= self.total

    def look(self, *, ended: bool = False) -> None:
        """Read what happened since the last call; raises the error that ends the run. `ended`: it is complete."""
        for line in self._log.poll(ended=ended):
            self._read(plain(line))
        self._check_reward()
        self._prove()
        for step in self._metrics.poll():
            self._judge(step)
        self._check_clocks()
        self.handle.tend()
        self.display.tick()

    def _read(self, line: str) -> None:
        phase = phase_after(line, self._phase, validates=self.plan.spec.trainer.validate_before)
        if phase is not None and not self.steps:
            self._phase = phase
            self._moved = time.monotonic()
            what = f": {self.validates}" if self.validates and phase is StartPhase.VALIDATION else ""
            self.display.phase(f"{phase.words}{what}")
        total = total_steps(line)
        if total is not None:
            self.total = total
            self.display.expect(total)
        if self._frozen:
            self._report = self._report or self._frozen.take(line)
        cause = cause_in(line)
        if cause is None:
            return
        # more specific causes are earlier in the list
        self.cause = min(self.cause or cause, cause, key=CAUSES.index)
        # responses that an asynchronous mode sampled ahead fail when verl ends the engines after the last step
        if cause.fatal and self._doomed is None and not self._complete:
            self._doomed = (cause, time.monotonic())

    def _check_reward(self) -> None:
        """Raise RewardFailed if the run's own reward function failed."""
        report = self._report or (self._frozen and reward.read(self.plan.attempt_paths.root))
        if report:
            raise rewards.failed(self.plan, report)

    def _prove(self) -> None:
        if self._proven:
            return
        handshakes = self._handshakes()
        refuted = handshake.refutation(self._expected, handshakes)
        if refuted:
            raise EnvironmentNotReady(
                refuted, hint="`flashrl train --rollout bf16` trains without; the log says what vLLM loaded"
            )
        if len(handshakes) >= self._expected.workers:
            self._proven = True
            self.display.proven(handshakes)

    def _handshakes(self) -> list[Handshake]:
        return list(contract.read_handshakes(self.plan.attempt_paths.plugins))

    def _judge(self, step: StepMetrics) -> None:
        self._moved = time.monotonic()
        self.display.step(step)
        if not step.trained:
            return
        self.steps += 1
        self.last = step.step
        self._doomed = None  # whatever the log showed, the run continues
        self._prove()
        if not self._proven:
            reason = handshake.missing(self._expected, self._handshakes())
            raise EnvironmentNotReady(str(reason), hint="are flashrl's plugins installed on every node?")
        if step.lost:
            raise RunFailed(
                f"step {step.step}: NaN in {', '.join(step.lost)}", hint="lower the learning rate, or try bf16 rollouts"
            )
        self._warn_of_a_constant(step)
        self._warn_of_staleness(step)
        self._warn_of_dropped(step)
        correction, bounds = self.plan.spec.correction, self.plan.spec.watch
        broken = broken_rollout(step, bounds, self.vocabulary, correction.kind)
        if broken:
            hint = "this is no mismatch for TIS to correct; `--rollout bf16` shows whether quantization is at fault"
            if step.fresh is None:
                hint += ", a smaller trainer.prefetch whether staleness is"
            raise EnvironmentNotReady(
                f"step {step.step}: the rollout engine does not sample from the policy: {broken}", hint=hint
            )
        lost = lost_to_correction(step, correction, bounds)
        if lost:
            what, hint = lost
            raise RunFailed(f"step {step.step}: {what}", hint=hint)

    def _warn_of_a_constant(self, step: StepMetrics) -> None:
        """Warn, once in a row of such steps, that all responses of a few steps got the same reward."""
        least, largest = step["reward_min"], step["reward_max"]
        self._constant = self._constant + 1 if least is not None and least == largest else 0
        if self._constant == CONSTANT_STEPS:
            what = f"every response of {CONSTANT_STEPS} steps got the reward {least:g}, from which nothing is learned"
            self.display.warn(f"step {step.step}: {what}")

    def _warn_of_staleness(self, step: StepMetrics) -> None:
        """Warn, once, of stale tokens beyond the bounds of the rollout, where those without staleness are within."""
        enough = [number for number in step.stalenesses if (step[f"tokens{AT}{number}"] or 0) >= ENOUGH]
        if self._stale or not enough or step.fresh is None:
            return
        last, bound = enough[-1], self.plan.spec.watch.max_kl
        fresh, apart = step[f"kl{step.fresh}"], step[f"kl{AT}{last}"]
        if fresh is None or apart is None or abs(apart) <= bound:
            return
        self._stale = True
        self.display.warn(
            f"step {step.step}: tokens of staleness {last} have a KL of {apart:.3g} nats a token to the trainer, those "
            f"without staleness {fresh:.3g}: lower trainer.prefetch or trainer.max_staleness"
        )

    def _warn_of_dropped(self, step: StepMetrics) -> None:
        """Warn of groups of responses that were dropped, again whenever they are twice as many."""
        self._dropped += dropped([step])
        if self._dropped.total() >= max(1, 2 * self._warned):
            self._warned = self._dropped.total()
            self.display.warn(f"step {step.step}: dropped so far: {dropped_in_words(self._dropped)}")

    def _check_clocks(self) -> None:
        watch, now = self.plan.spec.watch, time.monotonic()
        if self._doomed and now - self._doomed[1] > watch.failure_grace_s:
            raise self.failure(self._doomed[0].what, self._doomed[0].hint)
        limit, key = self._limit()
        if now - self._moved > limit:
            during = "a step" if self.steps else f"the start ({self._phase.words})"
            raise RunFailed(
                f"no progress for {limit:g} s during {during}", hint=f"raise watch.{key} if it only is slow"
            )

    def _limit(self) -> tuple[float, str]:
        """Seconds that the current phase may take, and the key of `watch` that sets them."""
        watch, clock = self.plan.spec.watch, self._phase.clock_s
        if self.steps or clock is None:
            return watch.step_timeout_s, "step_timeout_s"
        return watch.start_timeout_s or clock, "start_timeout_s"

    def failure(self, what: str | None, hint: str, otherwise: str = "") -> RunFailed:
        """The error for a failed run: the known cause, and the root exception in one line."""
        root = root_error(last_lines(self.plan.attempt_paths.log, TRACEBACK_LINES))
        return RunFailed(": ".join(filter(None, (what, root))) or otherwise, hint=hint)


UNIFORM_TOLERANCE = 0.05
"""Largest difference in nats between the rollout's mean negative log-prob and ln(vocabulary) that counts as uniform
sampling.
"""


def broken_rollout(
    step: StepMetrics, bounds: WatchSpec, vocabulary: int | None, kind: CorrectionKind = "tis"
) -> str | None:
    """Why the rollout does not sample from the policy; None if it does, or if nothing was sampled in this step.

    verl scores the sampled tokens again with the trainer. Quantization changes those log-probs a little, which
    truncated importance sampling corrects; an engine whose refit is broken samples from another distribution, which
    nothing corrects. The bounds separate the two cases: healthy INT8 and FP8 runs show |KL| below 0.05 and a
    correlation above 0.95, an engine left with its dummy weights a KL above 3 and a correlation near 0.

    KL is in nats per token, as an absolute value because verl estimates it from samples; weights are importance weights
    after truncation, judged here if they are `tis` weights: the mean of others falls without the rollout being broken
    (`lost_to_correction`).

    In an asynchronous mode the bounds are those of tokens without staleness, or of tokens that were scored again with
    the weights that sampled them (`StepMetrics.fresh`): their distance is the engine's alone, so staleness neither
    excuses a broken refit nor passes for one. A step that has none of these is judged by the least stale tokens of
    which it has enough: a handful, such as the ends of interrupted responses, exceeds the bounds by chance. A broken
    engine exceeds the bounds there as well, and what exceeds them is too far off to be corrected, whatever the reason;
    the message says that it may be staleness.
    """
    if _samples_uniformly(step, vocabulary):
        return f"it samples uniformly: mean log-prob {-(step['rollout_nll'] or 0):.2f} = -ln({vocabulary})"
    part, of = step.fresh, " of tokens without staleness" if step.fresh else ""
    if part is None:
        enough = (number for number in step.stalenesses if (step[f"tokens{AT}{number}"] or 0) >= ENOUGH)
        least = next(enough, step.stalenesses[0])
        part, of = f"{AT}{least}", f" of tokens of staleness {least}"
    kl, weight = step[f"kl{part}"], step[f"weight_mean{part}"]
    if kl is not None and abs(kl) > bounds.max_kl:
        return f"KL between rollout and trainer{of} is {kl:.3g} nats a token (bound {bounds.max_kl:g})"
    if kind == "tis" and weight is not None and abs(weight - 1) > bounds.max_weight_deviation:
        return f"the importance weights' mean{of} is {weight:.3g} (bound 1 ± {bounds.max_weight_deviation:g})"
    return _uncorrelated(step, bounds, part, of)


def lost_to_correction(step: StepMetrics, correction: CorrectionSpec, bounds: WatchSpec) -> tuple[str, str] | None:
    """Why hardly anything of a step is left to learn from, and what to do about it; None if enough is left.

    The weight of a response is a product over its tokens: for 100 tokens and a cap of 2, the mean of weights is 0.98 at
    a KL of 0.001 nats a token and 0.36 at 0.025, if the logarithms of the ratios are normal.
    """
    mean, rejected, kl = step["weight_mean"], step["rejected"], step["kl_k3"]
    if mean is not None and 1 - mean > bounds.max_weight_deviation and correction.kind in ("seq-tis", "icepop"):
        bound = f"{mean:.3g} instead of 1 (bound: {bounds.max_weight_deviation:g} less)"
        if correction.kind == "icepop":
            return f"icepop zeroes most tokens: their mean weight is {bound}", "--set correction.kind=tis"
        apart = "" if kl is None else f" at a KL of {kl:.2g} nats a token"
        what = f"the weights of responses vanish{apart}: their mean is {bound}"
        return what, "--set correction.kind=tis: the mean of token weights does not fall with the length"
    if rejected is not None and rejected > bounds.max_rejected:
        what = f"correction.reject leaves out {rejected:.0%} of the tokens (bound {bounds.max_rejected:.0%})"
        return what, "wider bounds, or --set correction.reject=null"
    return None


def _samples_uniformly(step: StepMetrics, vocabulary: int | None) -> bool:
    rollout, trainer = step["rollout_nll"], step["train_nll"]
    if vocabulary is None or rollout is None or trainer is None:
        return False
    uniform = math.log(vocabulary)
    # an untrained policy is itself uniform: then both agree and nothing is wrong
    return abs(rollout - uniform) < UNIFORM_TOLERANCE and abs(trainer - rollout) > UNIFORM_TOLERANCE


def _uncorrelated(step: StepMetrics, bounds: WatchSpec, part: str, of: str) -> str | None:
    correlation, difference = step[f"prob_correlation{part}"], step[f"prob_diff{part}"]
    if correlation is None or difference is None:
        return None
    # a policy that is certain of every token has no spread to correlate, so a low correlation alone proves nothing
    if correlation < bounds.min_correlation and difference > bounds.max_prob_difference:
        return (
            f"probabilities{of or ' of the sampled tokens'} correlate by {correlation:.2f} only "
            f"(bound {bounds.min_correlation:g}) and differ by {difference:.2f} on average"
        )
    return None
