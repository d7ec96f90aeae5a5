"""What slows a training step: each cause in one line, with the keys of verl that avoid it.

`train.speed` finds the causes in a plan, `runs.speed` in the metrics of a run; both say them in these words. A cause is
said only of keys that are not set well already, so what the functions here get is a view of verl's keys: `Settings` of
a plan, or `Recorded` of a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flashrl_cli.config import yaml_file
from flashrl_cli.config.layers import option
from flashrl_cli.verl.attention import FLASH, VARLEN
from flashrl_cli.verl.config import FIELDS, LOG_PROBS, MASKED, ROLES, UPDATE, VALIDATION_LIMIT, Pass, written
from flashrl_cli.verl.overrides import AUTO, ROLLOUT

AGENTS = f"{ROLLOUT}.agent.num_workers"
GRAPHS = f"{ROLLOUT}.enforce_eager"
SEQUENCES = f"{ROLLOUT}.max_num_seqs"
ENGINE_SHARE = f"{ROLLOUT}.gpu_memory_utilization"
VALIDATE, SAVE = "trainer.test_freq", "trainer.save_freq"

LOW_MFU = 0.05
"""Share of a GPU's peak below which an update spends its time on something else than arithmetic.

Dense training in bf16 reaches 0.3 to 0.6 (Chowdhery et al., 2022, arXiv 2204.02311, table 3); short sequences and small
models get less.
"""
AGENT_RESPONSES = 2000
"""Responses that one agent-loop worker, an asyncio loop of Python, is asked to feed in a step before it is named."""
SHORT = 256
"""Longest sequence in tokens up to which padding is not worth a word."""


class Keys(Protocol):
    """verl's keys of a plan or of a recorded run."""

    def get(self, key: str) -> Any:
        """Value of a key; None where verl's tree has none."""

    def is_given(self, key: str) -> bool:
        """Whether a preset or an option set a key; a value that was derived is not given."""

    def is_verbatim(self, key: str) -> bool:
        """Whether a key is given under `verl:`."""

    def fix(self, key: str, value: Any, *, new: bool = False) -> str:
        """The command-line option that sets a key; `new` is for a key that verl's tree lacks."""


DEFAULTS: Mapping[str, Any] = {
    **{role.padding: True for role in ROLES.values()},
    **{f"{role.model}.enable_gradient_checkpointing": True for role in ROLES.values()},
    **{f"{ROLES[name].fsdp}.{what}_offload": False for name in ("actor", "critic") for what in ("param", "optimizer")},
    UPDATE.dynamic: False,
    UPDATE.tokens: 16384,
    AGENTS: 8,
    VALIDATION_LIMIT: -1,
}
"""verl's own values of keys that runs are judged by; those with a field of the preset have the field's default."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """verl's keys as the plan of a run (`train.plan.plan_document`) recorded them; what it lacks is verl's default."""

    plan: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Value of a key: that of the override, or else of the preset's field, or else verl's own."""
        for override in self.plan.get("overrides", ()):
            name, equals, text = str(override).lstrip("+").partition("=")
            if equals and name == key:
                return yaml_file.value(text).data
        value: Any = self.plan.get("spec", {})
        for name in FIELDS.get(key, "").split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return DEFAULTS.get(key) if value in (None, AUTO) else value

    def is_given(self, key: str) -> bool:
        """Whether the plan has an origin of a key's field that is neither verl's default nor derived."""
        origin = self.plan.get("origins", {}).get(written(key), "default")
        return self.get(key) is not None and not origin.startswith(("default", "derived"))

    def is_verbatim(self, key: str) -> bool:
        """Whether a key is given under `verl:`."""
        return not {key, f"+{key}"}.isdisjoint(self.plan.get("spec", {}).get("verl", ()))

    def fix(self, key: str, value: Any, *, new: bool = False) -> str:
        """The `--set` that gives a key another value."""
        return option(written(key, new=new), value, None)


@dataclass(frozen=True, slots=True)
class Slow:
    """Something that slows a step: its cause in a word, a sentence with the evidence, and the options that avoid it."""

    cause: str
    text: str
    fix: str = ""
    """Options for `flashrl train`, or empty where no key helps."""

    def __str__(self) -> str:
        return f"{self.text}: {self.fix}" if self.fix else self.text

    def document(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)


def _joined(options: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(options))  # one field of a preset may set several keys


def attention_of(k: Keys, role: str = "actor") -> str:
    """Name of the attention that a model trains with."""
    return str(k.get(ROLES[role].attention) or FLASH)


def _unmasked(k: Keys, roles: Iterable[str]) -> list[str]:
    """Options for an attention that takes packed sequences one by one, where another one was asked for."""
    masked = [ROLES[role].attention for role in roles if attention_of(k, role) in MASKED]
    verbatim = {key: option(f"verl.+{key}", VARLEN, None) for key in masked if k.is_verbatim(key)}
    return [verbatim.get(key) or k.fix(key, AUTO) for key in masked if key in verbatim or k.is_given(key)]


def padded(k: Keys, roles: Iterable[str]) -> list[str]:
    """Those of `roles` (keys of ROLES) whose sequences are padded."""
    return [role for role in roles if not k.get(ROLES[role].padding)]


def padding(k: Keys, roles: Iterable[str], evidence: str) -> Slow:
    """Sequences are padded to the longest of their micro-batch (verl/workers/engine/fsdp/transformer_impl.py:1286)."""
    found = padded(k, roles)
    fix = _joined([*(k.fix(ROLES[role].padding, True) for role in found), *_unmasked(k, found)])
    return Slow("padding", f"padding: {evidence}, and padding is computed like tokens", fix)


def attention(k: Keys, roles: Iterable[str]) -> Iterator[Slow]:
    """Packed sequences are computed under a mask of the whole pass."""
    found = [role for role in roles if not padded(k, [role]) and attention_of(k, role) in MASKED]
    if found:
        name = attention_of(k, found[0])
        text = f"attention: {name} computes all pairs of tokens of a packed pass, and masks those across sequences"
        # what `auto` chose has its reason, and less is computed of padded sequences then
        fix = _unmasked(k, found) or [k.fix(ROLES[role].padding, False) for role in found]
        yield Slow("attention", text, _joined(fix))


def is_counted(k: Keys) -> bool:
    """Whether somebody counted the responses or tokens of an update's pass, instead of leaving it to the memory."""
    return k.is_given(UPDATE.micro) or k.is_given(UPDATE.tokens)


def passes(k: Keys, evidence: str) -> Slow:
    """A mini-batch takes many small passes, which the estimate of memory would make larger."""
    rows = [step.micro for step in (UPDATE, LOG_PROBS) if k.is_given(step.micro)]
    fix = _joined([*(k.fix(key, None) for key in rows), k.fix(UPDATE.tokens, AUTO)])
    return Slow("passes", f"small passes: {evidence}", fix)


def recomputation(k: Keys, roles: Iterable[str], evidence: str = "") -> Iterator[Slow]:
    """Activations are computed twice, which costs one more forward pass: a third of forward and backward together."""
    keys = [f"{ROLES[role].model}.enable_gradient_checkpointing" for role in roles]
    if fix := _joined(k.fix(key, False) for key in keys if k.get(key)):
        text = f"recomputation: updates compute each forward pass twice, a third more arithmetic{evidence}"
        yield Slow("recomputation", text, fix)


def offloading(k: Keys, roles: Iterable[str]) -> list[str]:
    """Keys of the `roles` that move parameters or optimizer state to the CPU between phases."""
    keys = [f"{ROLES[role].fsdp}.{what}_offload" for role in roles for what in ("param", "optimizer")]
    return [key for key in keys if k.get(key)]


def offload(k: Keys, keys: Iterable[str], evidence: str = "") -> Iterator[Slow]:
    """States go to the CPU's memory and back around every phase; `keys` are those of `offloading` to do without."""
    if fix := _joined(k.fix(key, False) for key in keys):
        text = f"offload: parameters or optimizer state are copied to the CPU and back around each phase{evidence}"
        yield Slow("offload", text, fix)


def graphs(k: Keys) -> Iterator[Slow]:
    """The engine launches its kernels one by one."""
    if k.get(GRAPHS):
        text = "generation: without CUDA graphs the engine launches every kernel of every token by itself"
        yield Slow("graphs", text, k.fix(GRAPHS, False))


def waves(k: Keys, responses: int, at_once: int, possible: int) -> Slow:
    """An engine samples its `responses` in groups of `at_once`, where `possible` many at once would do."""
    count = math.ceil(responses / at_once)
    text = f"generation: an engine samples its {responses:,} responses of a step in {count} waves of {at_once:,}"
    return Slow("waves", text, k.fix(SEQUENCES, possible))


def cache(k: Keys, held: int, responses: int, share: float) -> Slow:
    """The KV cache holds `held` of an engine's responses, and the engine may take a larger share of the memory."""
    text = f"generation: the KV cache of an engine holds about {held:,} of its {responses:,} responses of a step"
    return Slow("cache", f"{text}, at half the longest length", k.fix(ENGINE_SHARE, share))


def agents(k: Keys, responses: int) -> Iterator[Slow]:
    """Few agent-loop workers feed all requests to the engines."""
    workers = k.get(AGENTS)
    if isinstance(workers, int) and 0 < AGENT_RESPONSES * workers < responses:
        feed = "one agent-loop worker feeds" if workers == 1 else f"{workers} agent-loop workers feed"
        text = f"generation: {feed} the {responses:,} responses of a step to the engines"
        yield Slow("agents", text, k.fix(AGENTS, max(8, 2 * workers)))


def waiting(mean: float, longest: float, cut: float) -> Slow:
    """Generation ends with its longest response; lengths are in tokens, `cut` is the share that reaches the limit."""
    limit = f", the limit that {cut:.0%} of the responses reach" if cut else ""
    text = f"generation: a step waits for its longest response, {longest:,.0f} tokens where the mean is {mean:,.0f}"
    return Slow("waiting", f"{text}{limit}; a lower data.max_response_length or more prompts a step wait less")


def validation(k: Keys, evidence: str, every: int) -> Slow:
    """Validations take much of the time of a run; every `every` steps they would not."""
    return Slow("validation", f"frequent validation: {evidence}", k.fix(VALIDATE, every))


def checkpoints(k: Keys, evidence: str, every: int) -> Slow:
    """Checkpoints take much of the time of a run; every `every` steps they would not."""
    return Slow("checkpoints", f"frequent checkpoints: {evidence}", k.fix(SAVE, every))


def arithmetic(share: float, mfu: float) -> Slow:
    """The policy update takes a `share` of a step, and uses little of the GPU's arithmetic."""
    text = f"policy update: {share:.0%} of a step at {mfu:.1%} of the GPU's peak arithmetic (MFU)"
    return Slow("mfu", f"{text}, where 20 to 50 % are usual for long sequences of a large model")


def rows_of(k: Keys, step: Pass) -> int | None:
    """Responses of a forward pass; None where verl batches by tokens."""
    rows = None if k.get(step.dynamic) else k.get(step.micro)
    return rows if isinstance(rows, int) else None
