"""From a preset and the command line to a checked RunSpec that knows where each value came from.

Values that follow from others unless they are set.

What must hold between the values of a spec. A rule yields findings; nothing here knows of verl.

Add a rule: write a generator over RunSpec, list it in RULES. What verl itself demands is judged in `verl.demands`.

The command line's part of the configuration: `--rollout`, `--tis` and `--set`, as layers over a preset.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from flashrl_cli.config import diagnose, presets, yaml_file
from flashrl_cli.config.layers import DEFAULT, Layer, Origin, leaves, merge, nested
from flashrl_cli.config.presets import VERBATIM
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError, Problem
from flashrl_cli.precision import PRECISIONS, SMOOTHED
from flashrl_cli.secrets import looks_secret
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flashrl_cli.config.diagnose import Translate


class Derived(NamedTuple):
    """A value for a key that is null, and why."""

    key: str
    value: int | str
    reason: str


def derived_values(spec: RunSpec) -> Iterator[Derived]:
    """Yield the values that follow."""
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    if spec.rollout.max_model_len is None:
        yield Derived("rollout.max_model_len", longest, "data.max_prompt_length + data.max_response_length")
    if spec.algorithm.advantage == "gae":
        yield from _critic_values(spec, longest)


def _critic_values(spec: RunSpec, longest: int) -> Iterator[Derived]:
    critic = spec.critic
    if critic.path is None:
        yield Derived("critic.path", spec.model.path, "model.path")
    if critic.max_tokens_per_gpu is None and critic.micro_batch_size_per_gpu is not None:
        tokens = critic.micro_batch_size_per_gpu * longest
        yield Derived("critic.max_tokens_per_gpu", tokens, "critic.micro_batch_size_per_gpu full-length responses")


class Finding(NamedTuple):
    """A broken rule: the key to look at, what is wrong, and the fix."""

    key: str
    message: str
    hint: str


Rule = Callable[[RunSpec], Iterator[Finding]]


def mini_batch_divides_batch(spec: RunSpec) -> Iterator[Finding]:
    """An optimizer step takes a whole share of the step's prompts."""
    mini, batch = spec.algorithm.mini_batch_size, spec.data.train_batch_size
    if mini > batch:
        yield Finding(
            "algorithm.mini_batch_size",
            f"{mini} is more than data.train_batch_size = {batch}",
            f"--set algorithm.mini_batch_size={batch}",
        )
    elif batch % mini:
        fitting = max(n for n in range(1, mini) if batch % n == 0)
        yield Finding(
            "algorithm.mini_batch_size",
            f"{mini} does not divide data.train_batch_size = {batch}",
            f"--set algorithm.mini_batch_size={fitting}",
        )


def group_has_members(spec: RunSpec) -> Iterator[Finding]:
    """GRPO compares responses to one prompt; with a single one every advantage is 0."""
    if spec.algorithm.advantage == "grpo" and spec.rollout.n == 1:
        yield Finding("rollout.n", "GRPO needs more than one response a prompt", "--set rollout.n=8")


def filtered_groups_vary(spec: RunSpec) -> Iterator[Finding]:
    """A group of one has no spread: nothing would ever be filtered (GRPO says more, above)."""
    if spec.algorithm.filter_groups.enable and spec.rollout.n == 1 and spec.algorithm.advantage != "grpo":
        yield Finding(
            "algorithm.filter_groups.enable",
            "filters nothing with one response a prompt",
            "--set rollout.n=8, or --set algorithm.filter_groups.enable=false",
        )


def metrics_are_written(spec: RunSpec) -> Iterator[Finding]:
    """The table, the guard and `runs` read verl's file logger."""
    if "file" not in spec.trainer.logger:
        shown = ",".join((*spec.trainer.logger, "file"))
        yield Finding("trainer.logger", "lacks file, which flashrl reads", f"--set 'trainer.logger=[{shown}]'")


def overlong_fits(spec: RunSpec) -> Iterator[Finding]:
    """A penalty needs the manager that applies it and fits into the response (verl asserts so in a worker)."""
    overlong, longest = spec.reward.overlong, spec.data.max_response_length
    if overlong and spec.reward.manager != "dapo":
        yield Finding("reward.overlong", f"manager {spec.reward.manager} does not know it", "--set reward.manager=dapo")
    if overlong and overlong.buffer_len > longest:
        yield Finding(
            "reward.overlong.buffer_len",
            f"{overlong.buffer_len} is more than data.max_response_length = {longest}",
            f"--set reward.overlong.buffer_len={longest}",
        )


def dual_clip_bounds_from_above(spec: RunSpec) -> Iterator[Finding]:
    """Dual clip bounds the loss of ratios above 1 (arXiv 1912.09729, eq. 5); verl asserts it in the first update."""
    if spec.algorithm.clip_c <= 1:
        yield Finding("algorithm.clip_c", f"{spec.algorithm.clip_c:g} is not above 1", "--set algorithm.clip_c=3.0")


def warmup_ends(spec: RunSpec) -> Iterator[Finding]:
    """In the warm-up the policy does not learn: it needs a critic that does, and an end within the run."""
    warmup, steps = spec.trainer.critic_warmup, spec.trainer.steps
    if warmup and spec.algorithm.advantage != "gae":
        yield Finding(
            "trainer.critic_warmup",
            f"nothing learns in the first {counted(warmup, 'step')}: {spec.algorithm.advantage} has no critic",
            "--set trainer.critic_warmup=0",
        )
    elif steps is not None and warmup > steps:
        yield Finding(
            "trainer.critic_warmup",
            f"the policy never learns: {warmup} is more than trainer.steps = {steps}",
            f"--set trainer.critic_warmup={steps // 10}",
        )


def engine_holds_a_sequence(spec: RunSpec) -> Iterator[Finding]:
    """The engine ends a response where its longest sequence ends, without a word."""
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    held = spec.rollout.max_model_len
    if held is not None and held < longest:
        yield Finding(
            "rollout.max_model_len",
            f"{held} is less than data.max_prompt_length + data.max_response_length = {longest}",
            f"--set rollout.max_model_len={longest}",
        )


def engine_batches_its_sequences(spec: RunSpec) -> Iterator[Finding]:
    """A decoding step takes a token of every running sequence (vLLM refuses less: vllm/config/scheduler.py:263)."""
    tokens, sequences = spec.rollout.max_num_batched_tokens, spec.rollout.max_num_seqs
    if tokens < sequences:
        yield Finding(
            "rollout.max_num_batched_tokens",
            f"{tokens} is less than rollout.max_num_seqs = {sequences}",
            f"--set rollout.max_num_seqs={tokens}",
        )


def mix_has_two_precisions(spec: RunSpec) -> Iterator[Finding]:
    """Some replicas in bf16 and the others quantized, by methods that know their replica: verl's own does not."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.mix and "mix" not in row.goes_with:
        why = f"{row.name} is for all replicas alike" if row.quantized else f"every replica is in {row.name} already"
        yield Finding("rollout.mix", why, f"--set rollout.precision={row.sibling}")


def logits_are_proven(spec: RunSpec) -> Iterator[Finding]:
    """Who computes logits in float32 proves it at flashrl's own weight update."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.lm_head_fp32 and "head32" not in row.goes_with:
        yield Finding(
            "rollout.lm_head_fp32", f"{row.name} rollouts do not know it", f"--set rollout.precision={row.sibling}"
        )


def cache_in_8_bits_has_scales(spec: RunSpec) -> Iterator[Finding]:
    """The scales of an FP8 cache come with flashrl's own weight update (plugins/kv_scales.py)."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.kv_cache != "auto" and "kv8" not in row.goes_with:
        yield Finding(
            "rollout.kv_cache",
            f"{spec.rollout.kv_cache} needs flashrl's own weight update, and {row.name} has verl's",
            f"--rollout {row.sibling}, or --set rollout.kv_cache=auto",
        )


def profile_is_applied(spec: RunSpec) -> Iterator[Finding]:
    """Smoothing changes nothing but what is lost in quantizing, and verl's own weight update knows none."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.profile is None or "smooth" in row.goes_with:
        return
    why = (
        "take verl's own weight update, which smooths nothing"
        if row.quantized
        else "quantize nothing that it could smooth"
    )
    hint = f"--rollout {SMOOTHED[0]}, or --set rollout.profile=null"
    yield Finding("rollout.profile", f"{row.name} rollouts {why}", hint)


def no_secret_is_written_down(spec: RunSpec) -> Iterator[Finding]:
    """A preset is shared, and a plan is kept with the run: neither is a place for what lets somebody in."""
    named = {f"env.{name}": (name, value) for name, value in spec.env.items()}
    # among verl's keys only a variable's name can be told by its capitals from one like `pad_token`
    last = {key: key.rpartition(".")[2] for key in spec.verl}
    named |= {f"verl.{key}": (last[key] if last[key].isupper() else "", str(spec.verl[key] or "")) for key in last}
    for key, (name, value) in named.items():
        if looks_secret(name, value):
            yield Finding(
                key,
                "looks like a secret, and would be written into plans and records",
                f"export {name or 'it'} in the shell that starts flashrl, and leave it out here",
            )


RULES: tuple[Rule, ...] = (
    mini_batch_divides_batch,
    group_has_members,
    filtered_groups_vary,
    metrics_are_written,
    overlong_fits,
    dual_clip_bounds_from_above,
    warmup_ends,
    engine_holds_a_sequence,
    engine_batches_its_sequences,
    mix_has_two_precisions,
    logits_are_proven,
    cache_in_8_bits_has_scales,
    profile_is_applied,
    no_secret_is_written_down,
)


def findings(spec: RunSpec) -> Iterator[Finding]:
    """Yield what every rule finds."""
    for rule in RULES:
        yield from rule(spec)


FLAG_OF = {"rollout.precision": "--rollout", "correction.cap": "--tis"}
"""Keys that have a flag of their own."""
EXAMPLE = "--set algorithm.lr=1e-6"


def option_layers(
    rollout: str | None, tis: str | None, sets: Sequence[str], problems: list[Problem]
) -> Iterator[Layer]:
    """Yield a layer for each option given, `--set` last and in order; a bad text's is empty, and told in `problems`."""
    if rollout is not None:
        yield _flag("rollout.precision", rollout)
    if tis is not None:
        yield _flag("correction.cap", _cap(tis))
    for text in sets:
        yield _assignment(text, problems)


def is_text(key: str) -> bool:
    """Whether a key's value is a text whatever it looks like: that of a variable, `env.NAME`."""
    head, dot, _ = key.partition(".")
    return bool(dot) and head in VERBATIM


def _flag(key: str, value: Any) -> Layer:
    return Layer(kind="option", label=FLAG_OF[key], data=nested(key, value))


def _cap(text: str) -> Any:
    """Number of a `--tis` text, None for `off`; anything else as it is, for the spec to refuse."""
    number = yaml_file.value(text, "--tis").data
    if isinstance(number, int | float) and not isinstance(number, bool):
        return number
    return None if text == "off" else text


def _assignment(text: str, problems: list[Problem]) -> Layer:
    written, equals, value_text = text.partition("=")
    key = written.strip()
    shown = key if equals and all(key.split(".")) else text
    label = f"--set {shown if shown.isprintable() else ascii(shown)}"
    problem, value = _bad_key(text, key, equals), None
    if problem is None:
        document = yaml_file.value(value_text, label, is_text=is_text(key))
        value = document.data
        problem = _bad_value(key, value_text, document.problems)
    if problem:
        problems.append(Problem(problem.message, label, problem.hint))
    return Layer(kind="set", label=label, data={} if problem else nested(key, value))


def _bad_key(text: str, key: str, equals: str) -> Problem | None:
    if not equals or not key:
        near = re.fullmatch(r"([\w+-]+(?:\.[\w+-]+)+)[:\s]*(\S*)", text)
        hint = f"--set {near[1]}={near[2] or '…'}" if near else EXAMPLE
        return Problem("not of the form key=value", hint=hint)
    if not key.isprintable():
        return Problem("the key holds a character that nobody sees", hint="type it anew")
    if not all(key.split(".")):
        names = ".".join(name for name in key.split(".") if name)
        hint = f"--set {names}=…" if "." in names else EXAMPLE
        return Problem(f"{key!r} is no key: a dot stands between two names", hint=hint)
    return None


def _bad_value(key: str, text: str, found: Sequence[Problem]) -> Problem | None:
    if not found:
        return None
    if re.search("[\udc80-\udcff]", text):
        return Problem(f"{text!a} is no text in this shell's encoding", hint="export LC_ALL=C.UTF-8")
    quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
    hints = (found[0].hint, f"if that text is meant: --set {quoted}")
    return Problem(f"{text!r} is no value: {found[0].message}", hint="; ".join(filter(None, hints)))


UNKNOWN = "extra_forbidden"
"""pydantic's name for a key that a model lacks."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A valid spec, the origin of each of its dotted leaf keys, and what was wrong nevertheless.

    `broken` holds what could be left out (unknown keys, unreadable lines) or, where nothing was, the rules that values break.
    """

    spec: RunSpec
    origins: Mapping[str, Origin]
    preset: str = ""
    """As it was asked for: a name or a file."""
    layers: Sequence[Layer] = ()
    broken: tuple[Problem, ...] = ()

    def refusal(self, problems: Sequence[Problem]) -> InputError:
        """The error that tells `problems`, in the order of the files and options that they lie in."""
        return _refusal(self.preset, problems, self.layers)

    def value(self, key: str) -> Any:
        """Value at a dotted key of typed fields (not under `verl` or `env`); None below a part that is null."""
        value: Any = self.spec
        for name in key.split("."):
            value = getattr(value, name) if value is not None else None
        return value

    def is_set(self, key: str) -> bool:
        """Whether someone wrote the value, or it was derived: whether it is more than a default."""
        return self.origins.get(key, DEFAULT).layer != "default"


def load_spec(
    preset: str,
    *,
    rollout: str | None = None,
    tis: str | None = None,
    sets: Sequence[str] = (),
    translate: Translate = lambda _: None,
) -> Resolved:
    """Read a preset as `read_spec` does; raises InputError over what it tells in the result, too."""
    resolved = read_spec(preset, rollout=rollout, tis=tis, sets=sets, translate=translate)
    if resolved.broken:
        raise resolved.refusal(resolved.broken)
    return resolved


def read_spec(
    preset: str,
    *,
    rollout: str | None = None,
    tis: str | None = None,
    sets: Sequence[str] = (),
    translate: Translate = lambda _: None,
) -> Resolved:
    """Read a preset (name or file), apply the options, validate; what leaves a valid spec is told in the result.

    `rollout` is a precision, `tis` the text of a cap or `off`, `sets` are texts `key=value`; `translate` gives the hint
    to a key that the spec lacks and another program has. Reads preset files and the working folder.
    Raises InputError with every problem, each with file:line or its option, in the order of the files and options.
    """
    problems: list[Problem] = []
    read = [*presets.read_layers(preset, problems), *option_layers(rollout, tis, sets, problems)]
    layers = [diagnose.well_shaped(layer, problems) for layer in read]
    data, origins = merge(layers)
    spec = _validate(data, origins, problems, translate)
    if spec is None:
        raise _refusal(preset, problems, layers)
    layers += [Layer(kind="derived", label=d.reason, data=nested(d.key, d.value)) for d in derived_values(spec)]
    data, origins = merge(layers)
    spec = RunSpec.model_validate(_known(data) if problems else data)
    # rules may be broken only because something was left out
    broken = problems or [
        Problem(f"{f.key}: {f.message}", diagnose.where(f.key, origins), f.hint) for f in findings(spec)
    ]
    told = {key: origins.get(key, DEFAULT) for key, _ in leaves(spec.model_dump())}
    return Resolved(spec, told, preset, tuple(layers), tuple(broken))


def _validate(
    data: Mapping[str, Any], origins: Mapping[str, Origin], problems: list[Problem], translate: Translate
) -> RunSpec | None:
    """The spec without its unknown keys, or None, with problems appended; what is missing may stand where it could not be read."""
    try:
        return RunSpec.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        found = diagnose.problems_of(errors, origins, translate)
        problems += [problem for problem in found if problem.where or not problems]
        return RunSpec.model_validate(_known(data)) if all(e["type"] == UNKNOWN for e in errors) else None


def _known(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` without the keys that the spec does not know."""
    try:
        RunSpec.model_validate(data)
    except ValidationError as error:
        unknown = [e["loc"] for e in error.errors(include_url=False) if e["type"] == UNKNOWN]
        return _without(data, unknown)
    return dict(data)


def _without(data: Mapping[str, Any], keys: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    dropped = {key[0] for key in keys if len(key) == 1}
    return {
        name: _without(value, [key[1:] for key in keys if key[0] == name]) if isinstance(value, dict) else value
        for name, value in data.items()
        if name not in dropped
    }


def _refusal(preset: str, problems: Sequence[Problem], layers: Sequence[Layer]) -> InputError:
    told = list(dict.fromkeys(sorted(problems, key=lambda problem: _position(problem.where, layers))))
    return InputError(f"preset {preset}: {counted(len(told), 'problem')}", problems=told)


def _position(where: str | None, layers: Sequence[Layer]) -> tuple[int, int]:
    """Place of `label` or `label:line` among the layers; what has none comes last."""
    order = {layer.label: number for number, layer in enumerate(layers)}
    label, _, line = (where or "").rpartition(":")
    if where not in order and line.isdecimal():
        return order.get(label, len(order)), int(line)
    return order.get(where or "", len(order)), 0
