"""Resolves a preset and command-line options into a checked RunSpec with the origin of each value.

In reading order: values that are derived from others, rules between the values of a spec, command-line options as
layers over a preset, reading and validating all layers, and a summary of each preset. Nothing here depends on verl; the
rules for what verl requires are in `verl.lint`.

To add a rule, write a generator over RunSpec and list it in RULES.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from flashrl_cli.config import correction, diagnose, presets, yaml_file
from flashrl_cli.config.diagnose import Rule, Violation
from flashrl_cli.config.layers import DEFAULT, Layer, Origin, derived, leaves, merge, nested, option, rank
from flashrl_cli.config.presets import VERBATIM
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.precision import PRECISIONS, ROTATED, SMOOTHED
from flashrl_cli.reward_function import REFERENCE, is_reference
from flashrl_cli.secrets import looks_secret
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

    from flashrl_cli.config.diagnose import Translate
    from flashrl_cli.config.spec import ResourceSpec


def derived_layers(spec: RunSpec, layers: Sequence[Layer]) -> Iterator[Layer]:
    """Yield a layer for every key whose value is derived from others: it is null, or a later word overrules it.

    `layers` are those that the spec was merged from. A later word is `trainer.validate_every` for
    `trainer.validate_before`: who switches validation off wants none before the first step either.
    """
    critic, trains_critic = spec.critic, spec.algorithm.advantage == "gae"
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    if spec.rollout.max_model_len is None:
        yield derived("rollout.max_model_len", longest, "data.max_prompt_length + data.max_response_length")
    if trains_critic and critic.path is None:
        yield derived("critic.path", spec.model.path, "model.path")
    yield from _passes(spec)
    yield from correction.derivations(spec, layers)
    if trains_critic and critic.max_tokens_per_gpu in (None, "auto") and critic.micro_batch_size_per_gpu is not None:
        tokens = critic.micro_batch_size_per_gpu * longest
        yield derived("critic.max_tokens_per_gpu", tokens, "critic.micro_batch_size_per_gpu full-length responses")
    if spec.trainer.mode == "separate_async":
        for name in ("nodes", "gpus_per_node"):
            if getattr(spec.resources, f"rollout_{name}") is None:
                yield derived(f"resources.rollout_{name}", getattr(spec.resources, name), f"resources.{name}")
    before, every = (rank(key, layers) for key in ("trainer.validate_before", "trainer.validate_every"))
    if spec.trainer.validate_every <= 0 and (before < every or before < 0):
        yield derived("trainer.validate_before", False, f"trainer.validate_every = {spec.trainer.validate_every}")


def _passes(spec: RunSpec) -> Iterator[Layer]:
    """Layers of the policy's passes, which are batched by responses where a number of responses is given."""
    update, log_probs = spec.algorithm.micro_batch_size_per_gpu, spec.rollout.log_prob_micro_batch_size_per_gpu
    tokens = spec.rollout.log_prob_max_tokens_per_gpu
    if update is not None and spec.algorithm.max_tokens_per_gpu == "auto":
        yield derived("algorithm.max_tokens_per_gpu", None, "algorithm.micro_batch_size_per_gpu counts responses")
    by_responses = update is not None or spec.algorithm.max_tokens_per_gpu is None
    if tokens == "auto" and (by_responses or log_probs is not None):
        yield derived("rollout.log_prob_max_tokens_per_gpu", None, "log-probs are batched by responses")
    if update is not None and log_probs is None and tokens in (None, "auto"):
        yield derived("rollout.log_prob_micro_batch_size_per_gpu", update, "algorithm.micro_batch_size_per_gpu")


def mini_batch_divides_batch(spec: RunSpec) -> Iterator[Violation]:
    """The mini-batch divides the batch, so that each optimizer step gets the same number of prompts."""
    mini, batch = spec.algorithm.mini_batch_size, spec.data.train_batch_size
    if mini > batch:
        yield Violation(
            "algorithm.mini_batch_size",
            f"{mini} is more than data.train_batch_size = {batch}",
            fix={"algorithm.mini_batch_size": batch},
        )
    elif batch % mini:
        fitting = max(n for n in range(1, mini) if batch % n == 0)
        yield Violation(
            "algorithm.mini_batch_size",
            f"{mini} does not divide data.train_batch_size = {batch}",
            fix={"algorithm.mini_batch_size": fitting},
        )


def passes_have_one_size(spec: RunSpec) -> Iterator[Violation]:
    """A pass is bounded by responses or by tokens, not by both."""
    algorithm, critic, rollout = spec.algorithm, spec.critic, spec.rollout
    tokens_of_critic = critic.max_tokens_per_gpu
    if critic.micro_batch_size_per_gpu is not None:
        derived = tokens_of_critic == critic.micro_batch_size_per_gpu * spec.data.max_length
        tokens_of_critic = None if derived or algorithm.advantage != "gae" else tokens_of_critic
    for start, responses, tokens in (
        ("algorithm.", algorithm.micro_batch_size_per_gpu, algorithm.max_tokens_per_gpu),
        ("rollout.log_prob_", rollout.log_prob_micro_batch_size_per_gpu, rollout.log_prob_max_tokens_per_gpu),
        ("critic.", critic.micro_batch_size_per_gpu, tokens_of_critic),
    ):
        if responses is not None and tokens is not None:
            rows = f"{start}micro_batch_size_per_gpu"
            yield Violation(
                f"{start}max_tokens_per_gpu",
                f"{tokens} tokens a pass, and {rows} = {responses} responses: only one of them can bound it",
                fix={f"{start}max_tokens_per_gpu": "auto", rows: None},
            )


def passes_are_counted_alike(spec: RunSpec) -> Iterator[Violation]:
    """Updates and log-probs are both batched by tokens, or both by responses.

    Workers assert it when they start (verl/workers/engine_workers.py:616).
    """
    by_tokens = spec.algorithm.max_tokens_per_gpu is not None
    responses, tokens = spec.rollout.log_prob_micro_batch_size_per_gpu, spec.rollout.log_prob_max_tokens_per_gpu
    if by_tokens and responses is not None and tokens is None and spec.algorithm.micro_batch_size_per_gpu is None:
        rows = "rollout.log_prob_micro_batch_size_per_gpu"
        yield Violation(
            rows,
            "counts responses, and algorithm.max_tokens_per_gpu tokens; verl takes only one way for both",
            fix={rows: None, "algorithm.micro_batch_size_per_gpu": responses},
        )
    if not by_tokens and tokens is not None and responses is None:
        yield Violation(
            "rollout.log_prob_max_tokens_per_gpu",
            "counts tokens, and the policy update responses; verl takes only one way for both",
            fix={"rollout.log_prob_max_tokens_per_gpu": None},
        )


def filtered_groups_vary(spec: RunSpec) -> Iterator[Violation]:
    """A group of one response never varies, so filtering would be meaningless; `group_has_members` has the others."""
    if spec.algorithm.filter_groups.enable and spec.rollout.n == 1 and spec.algorithm.advantage in correction.ALONE:
        yield Violation(
            "algorithm.filter_groups.enable",
            "filters nothing with one response a prompt",
            fix={"rollout.n": 8, "algorithm.filter_groups.enable": False},
        )


def shares_are_of_data_sets(spec: RunSpec) -> Iterator[Violation]:
    """Each data set to train on has a share."""
    shares, sets = spec.data.shares, spec.data.train_sets
    if shares is not None and len(shares) != len(sets):
        what = f"{counted(len(shares), 'share')} for {counted(len(sets), 'data set')} of data.train"
        yield Violation("data.shares", what, fix={"data.shares": [1.0] * len(sets) if len(sets) > 1 else None})


def metrics_are_written(spec: RunSpec) -> Iterator[Violation]:
    """verl's file logger is on: the table of a run, its guard and `flashrl runs` read its metrics."""
    if "file" not in spec.trainer.logger:
        shown = ",".join((*spec.trainer.logger, "file"))
        yield Violation("trainer.logger", "lacks file, which flashrl reads", fix={"trainer.logger": f"[{shown}]"})


def overlong_fits(spec: RunSpec) -> Iterator[Violation]:
    """An overlong penalty needs a manager that applies it, and a buffer no longer than a response.

    verl asserts the latter in a worker.
    """
    overlong, longest = spec.reward.overlong, spec.data.max_response_length
    if overlong and spec.reward.manager != "dapo":
        yield Violation(
            "reward.overlong", f"manager {spec.reward.manager} does not know it", fix={"reward.manager": "dapo"}
        )
    if overlong and overlong.buffer_len > longest:
        yield Violation(
            "reward.overlong.buffer_len",
            f"{overlong.buffer_len} is more than data.max_response_length = {longest}",
            fix={"reward.overlong.buffer_len": longest},
        )


def reward_names_a_function(spec: RunSpec) -> Iterator[Violation]:
    """A reward function is given by its file and name, its arguments by names that Python takes."""
    function = spec.reward.function
    if function is not None and not is_reference(function):
        what = f"{function!r} does not name a reward function"
        yield Violation("reward.function", what, fix={"reward.function": REFERENCE})
    for name in spec.reward.arguments:
        if not name.isidentifier():
            yield Violation(f"reward.arguments.{name}", "is not the name of an argument", "letters, digits and _")
    if spec.reward.arguments and function is None:
        why = "nothing reads them without reward.function"
        yield Violation("reward.arguments", why, fix={"reward.function": REFERENCE})


def dual_clip_bounds_from_above(spec: RunSpec) -> Iterator[Violation]:
    """Dual clip needs a bound above 1 (arXiv 1912.09729, eq. 5); verl asserts it in the first update."""
    if spec.algorithm.clip_c <= 1:
        yield Violation("algorithm.clip_c", f"{spec.algorithm.clip_c:g} is not above 1", fix={"algorithm.clip_c": 3.0})


def warmup_ends(spec: RunSpec) -> Iterator[Violation]:
    """The warm-up, in which only the critic learns, needs a critic and must end within the run."""
    warmup, steps = spec.trainer.critic_warmup, spec.trainer.steps
    if warmup and spec.algorithm.advantage != "gae":
        yield Violation(
            "trainer.critic_warmup",
            f"nothing learns in the first {counted(warmup, 'step')}: {spec.algorithm.advantage} has no critic",
            fix={"trainer.critic_warmup": 0},
        )
    elif steps is not None and warmup > steps:
        yield Violation(
            "trainer.critic_warmup",
            f"the policy never learns: {warmup} is more than trainer.steps = {steps}",
            fix={"trainer.critic_warmup": steps // 10},
        )


def staleness_is_corrected(spec: RunSpec) -> Iterator[Violation]:
    """Responses of older policies, on which asynchronous modes train, need a correction."""
    if spec.trainer.mode != "sync" and not spec.correction.active:
        yield Violation(
            "trainer.mode",
            f"{spec.trainer.mode} trains on responses of older policies, and nothing corrects for that",
            fix={"correction.kind": "tis", "trainer.mode": "sync"},
        )


def prefetched_groups_are_used(spec: RunSpec) -> Iterator[Violation]:
    """What is sampled `prefetch` batches ahead is used in its step `prefetch` + 1, which `drop` must allow.

    verl counts the step that submitted a prompt as the first (verl/trainer/ppo/v1/replay_buffer.py:523). Of a fraction
    it takes whole prompts (trainer_base.py:637), the last of which wait as long as those of a whole batch.
    """
    trainer, batch = spec.trainer, spec.data.train_batch_size
    waits = math.ceil(math.floor(trainer.prefetch * batch) / batch)
    if trainer.mode != "sync" and trainer.stale == "drop" and trainer.max_staleness <= waits:
        rounded = "" if waits == trainer.prefetch else ", rounded up"
        yield Violation(
            "trainer.max_staleness",
            f"{trainer.max_staleness} is not more than trainer.prefetch = {trainer.prefetch:g}{rounded}: what is "
            "sampled ahead would be dropped when its turn comes",
            fix={"trainer.max_staleness": waits + 1, "trainer.prefetch": 0},
        )


def rollout_devices_are_used(spec: RunSpec) -> Iterator[Violation]:
    """GPUs for rollout engines alone need the mode that has such engines."""
    if spec.trainer.mode == "separate_async":
        return
    for name in ("rollout_nodes", "rollout_gpus_per_node"):
        if getattr(spec.resources, name) is not None:
            yield Violation(
                f"resources.{name}",
                f"no engine uses these GPUs: in mode {spec.trainer.mode} all engines share the trainer's",
                fix={"trainer.mode": "separate_async", f"resources.{name}": None},
            )


def engine_holds_a_sequence(spec: RunSpec) -> Iterator[Violation]:
    """The engine's longest sequence holds prompt and response; otherwise it silently cuts responses short."""
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    held = spec.rollout.max_model_len
    if held is not None and held < longest:
        yield Violation(
            "rollout.max_model_len",
            f"{held} is less than data.max_prompt_length + data.max_response_length = {longest}",
            fix={"rollout.max_model_len": longest},
        )


def engine_batches_its_sequences(spec: RunSpec) -> Iterator[Violation]:
    """A decoding step takes one token of each running sequence; vLLM refuses less (vllm/config/scheduler.py:263)."""
    tokens, sequences = spec.rollout.max_num_batched_tokens, spec.rollout.max_num_seqs
    if tokens < sequences:
        yield Violation(
            "rollout.max_num_batched_tokens",
            f"{tokens} is less than rollout.max_num_seqs = {sequences}",
            fix={"rollout.max_num_seqs": tokens},
        )


def mix_has_two_precisions(spec: RunSpec) -> Iterator[Violation]:
    """A mix of bf16 and quantized replicas needs a flashrl method: verl's own quantizes all replicas alike."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.mix and "mix" not in row.goes_with:
        why = f"{row.name} is for all replicas alike" if row.quantized else f"every replica is in {row.name} already"
        yield Violation("rollout.mix", why, fix={"rollout.precision": row.sibling})


def logits_are_proven(spec: RunSpec) -> Iterator[Violation]:
    """Logits in float32 need a precision whose weight update verifies them, which is flashrl's own."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.lm_head_fp32 and "head32" not in row.goes_with:
        why = f"{row.name} rollouts do not know it"
        yield Violation("rollout.lm_head_fp32", why, fix={"rollout.precision": row.sibling})


def cache_in_8_bits_has_scales(spec: RunSpec) -> Iterator[Violation]:
    """A KV cache in 8 bits needs flashrl's own weight update, which proves it and sets the scales of FP8."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.kv_cache != "auto" and "kv8" not in row.goes_with:
        yield Violation(
            "rollout.kv_cache",
            f"{spec.rollout.kv_cache} needs flashrl's own weight update, and {row.name} has verl's",
            fix={"rollout.precision": row.sibling, "rollout.kv_cache": "auto"},
        )


def rotation_is_for_integers(spec: RunSpec) -> Iterator[Violation]:
    """A rotation helps a precision with steps of one size, and costs one with a floating point."""
    row, asked = PRECISIONS[spec.rollout.precision], spec.rollout.rotation
    if row.rotates or asked in ("auto", "off"):
        return
    why = (
        "a rotation takes them further from the trainer (KL 0.0426 nats a token instead of 0.0276, docs/rotation.md)"
        if row.quantized
        else "they round nothing that a rotation could spread"
    )
    fix = {"rollout.rotation": "auto", "rollout.precision": ROTATED[0]}
    yield Violation("rollout.rotation", f"{asked} is not for {row.name} rollouts: {why}", fix=fix)


def profile_suits_the_basis(spec: RunSpec) -> Iterator[Violation]:
    """A smoothing profile is made for the input's own channels, which a rotation mixes."""
    if spec.rollout.profile is not None and isinstance(spec.rollout.rotation, int):
        yield Violation(
            "rollout.rotation",
            f"{spec.rollout.rotation} mixes the channels for which rollout.profile was made",
            fix={"rollout.profile": None, "rollout.rotation": "off"},
        )


def profile_is_applied(spec: RunSpec) -> Iterator[Violation]:
    """A smoothing profile needs a quantized precision with flashrl's weight update; verl's does not apply it."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.profile is None or "smooth" in row.goes_with:
        return
    why = (
        "take verl's own weight update, which smooths nothing"
        if row.quantized
        else "quantize nothing that it could smooth"
    )
    fix = {"rollout.precision": SMOOTHED[0], "rollout.profile": None}
    yield Violation("rollout.profile", f"{row.name} rollouts {why}", fix=fix)


def no_secret_is_written_down(spec: RunSpec) -> Iterator[Violation]:
    """No preset contains a credential: presets are shared, and a plan is stored with the run."""
    named = {f"env.{name}": (name, value) for name, value in spec.env.items()}
    # among verl's keys, only capitals distinguish an environment variable from a key like `pad_token`
    last = {key: key.rpartition(".")[2] for key in spec.verl}
    named |= {f"verl.{key}": (last[key] if last[key].isupper() else "", str(spec.verl[key] or "")) for key in last}
    for key, (name, value) in named.items():
        if looks_secret(name, value):
            yield Violation(
                key,
                "looks like a secret, and would be written into plans and records",
                f"export {name or 'it'} in the shell that starts flashrl, and leave it out here",
            )


RULES: tuple[Rule, ...] = (
    mini_batch_divides_batch,
    passes_have_one_size,
    passes_are_counted_alike,
    *correction.RULES,
    filtered_groups_vary,
    shares_are_of_data_sets,
    metrics_are_written,
    overlong_fits,
    reward_names_a_function,
    dual_clip_bounds_from_above,
    warmup_ends,
    staleness_is_corrected,
    prefetched_groups_are_used,
    rollout_devices_are_used,
    engine_holds_a_sequence,
    engine_batches_its_sequences,
    mix_has_two_precisions,
    logits_are_proven,
    cache_in_8_bits_has_scales,
    rotation_is_for_integers,
    profile_suits_the_basis,
    profile_is_applied,
    no_secret_is_written_down,
)


EXAMPLE = "--set algorithm.lr=1e-6"
SWEPT = {"rollout": "rollout.precision", "tis": "correction.cap"}
"""Short names that a sweep accepts for keys with an option of the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line's part of a configuration.

    `rollout` is a precision; `tis` is the text of a cap, or `off`; `sets` are texts of the form `key=value`; `point` is
    this run's point of a sweep, a text for each key that varies.
    """

    rollout: str | None = None
    tis: str | None = None
    sets: Sequence[str] = ()
    point: Sequence[tuple[str, str]] = ()

    def __bool__(self) -> bool:
        return bool(self.rollout or self.tis or self.sets or self.point)


NO_OPTIONS = Options()


def option_layers(options: Options, problems: list[Problem]) -> Iterator[Layer]:
    """Yield a layer for each option given, in order of precedence, the strongest last.

    An option with a malformed text is added to `problems`, and its layer is empty.
    """
    if options.rollout is not None:
        yield _flag("rollout.precision", options.rollout, Location("--rollout"))
    if options.tis is not None:
        yield _tis(options.tis, Location("--tis"))
    for text in options.sets:
        key = text.partition("=")[0].strip()
        shown = key if "=" in text and all(key.split(".")) else text
        where = Location("--set", key=shown if shown.isprintable() else ascii(shown))
        yield _assignment(text, where, problems)
    for key, text in options.point:
        where = Location("--sweep", key=key)
        if key in SWEPT:
            item = yaml_file.value(text).data  # an item of a list may be quoted; the text of an option is not
            unquoted = item if isinstance(item, str) else text
            yield _tis(unquoted, where) if key == "tis" else _flag(SWEPT[key], unquoted, where)
        else:
            yield _assignment(f"{key}={text}", where, problems)


def is_text(key: str) -> bool:
    """Whether a key's value is always text, even if it looks like a number: that of a variable, `env.NAME`."""
    head, dot, _ = key.partition(".")
    return bool(dot) and head in VERBATIM


def _flag(key: str, text: str, where: Location) -> Layer:
    return Layer(Origin("option", where), nested(key, text))


def _tis(text: str, where: Location) -> Layer:
    """Token weights with the cap of a `--tis` text, or no weights for `off`; the spec refuses any other text."""
    number = yaml_file.value(text).data
    if isinstance(number, int | float) and not isinstance(number, bool):
        weights: dict[str, Any] = {"kind": "tis", "cap": number}
    else:
        weights = {"kind": "none", "cap": None} if text == "off" else {"cap": text}
    return Layer(Origin("option", where), {"correction": weights})


def _assignment(text: str, where: Location, problems: list[Problem]) -> Layer:
    written, equals, value_text = text.partition("=")
    key = written.strip()
    problem, value = _bad_key(text, key, equals), None
    if problem is None:
        document = yaml_file.value(value_text, where, is_text=is_text(key))
        value = document.data
        problem = _bad_value(key, value_text, document.problems)
    if problem:
        problems.append(replace(problem, where=where))
    return Layer(Origin("set", where), {} if problem else nested(key, value))


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
        return Problem(f"{key!r} is no key: a dot goes between two names", hint=hint)
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
"""pydantic's error type for a key that a model lacks."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A valid spec, the origin of each of its dotted leaf keys, and the problems in spite of which it is valid.

    `broken` holds the problems of what was left out (unknown keys, unreadable lines) or, if nothing was left out, the
    broken rules.
    """

    spec: RunSpec
    origins: Mapping[str, Origin]
    preset: str = ""
    """The preset as the user gave it: a name or a file."""
    layers: Sequence[Layer] = ()
    broken: tuple[Problem, ...] = ()

    def checked(self) -> Resolved:
        """Return the object itself; raises InputError with all problems if there are any."""
        if self.broken:
            raise self.refusal(self.broken)
        return self

    def refusal(self, problems: Sequence[Problem]) -> InputError:
        """InputError with `problems`, sorted by the files and options in which they were written."""
        return _refusal(self.preset, problems, self.layers)

    def value(self, key: str) -> Any:
        """Value of a typed field by its dotted key (not under `verl` or `env`); None below a part that is null."""
        value: Any = self.spec
        for name in key.split("."):
            value = getattr(value, name) if value is not None else None
        return value

    def is_set(self, key: str) -> bool:
        """Whether a value was written or derived, and is not just the default."""
        return self.origins.get(key, DEFAULT).layer != "default"

    def option(self, key: str, value: Any) -> str:
        """The command-line option that gives a key another value: `--sweep` for a key that a sweep varies."""
        return option(key, value, self.origins.get(key, DEFAULT).where)


def read_spec(preset: str, options: Options = NO_OPTIONS, translate: Translate = lambda _: None) -> Resolved:
    """Read a preset (name or file), apply the options and validate the result.

    Problems in spite of which the spec is valid are in the result; otherwise raises InputError with every problem, each
    with its file and line or its option, in their order. `translate` gives the hint for a key that the spec lacks and
    another program has. Reads preset files and the working folder.
    """
    problems: list[Problem] = []
    read = [*presets.read_layers(preset, problems), *option_layers(options, problems)]
    layers = [diagnose.well_shaped(layer, problems) for layer in read]
    data, origins = merge(layers)
    errors = _errors(data)
    if errors:
        found = diagnose.problems_of(errors, origins, translate)
        # a missing key may be in a line that could not be read
        problems += [problem for problem in found if problem.where or not problems]
    unknown = [error["loc"] for error in errors if error["type"] == UNKNOWN]
    if len(unknown) < len(errors):
        raise _refusal(preset, problems, layers)
    spec = RunSpec.model_validate(_without(data, unknown))
    layers += list(derived_layers(spec, layers))
    data, written = merge(layers)
    spec = RunSpec.model_validate(_without(data, unknown))
    # with something left out, a rule may be broken only because of that
    broken = problems or _broken_rules(spec, written)
    origins = {key: written.get(key, DEFAULT) for key, _ in leaves(spec.model_dump())}
    return Resolved(spec, origins, preset, tuple(layers), tuple(broken))


def _errors(data: Mapping[str, Any]) -> list[ErrorDetails]:
    try:
        RunSpec.model_validate(data)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _without(data: Mapping[str, Any], keys: Sequence[tuple[int | str, ...]]) -> dict[str, Any]:
    dropped = {key[0] for key in keys if len(key) == 1}
    return {
        name: _without(value, [key[1:] for key in keys if key[0] == name]) if isinstance(value, dict) else value
        for name, value in data.items()
        if name not in dropped
    }


def _broken_rules(spec: RunSpec, origins: Mapping[str, Origin]) -> Iterator[Problem]:
    for found in (violation for rule in RULES for violation in rule(spec)):
        fixes = [option(key, value, origins.get(key, DEFAULT).where) for key, value in found.fix.items()]
        where = diagnose.origin_of(found.key, origins).where
        yield Problem(f"{found.key}: {found.message}", where, found.hint or ", or ".join(fixes))


def _refusal(preset: str, problems: Sequence[Problem], layers: Sequence[Layer]) -> InputError:
    order = {layer.origin.where: number for number, layer in enumerate(layers)}

    def place(problem: Problem) -> tuple[int, int]:
        """Number of the problem's layer, and its line; problems without a location come last."""
        where = problem.where if isinstance(problem.where, Location) else None
        return (order.get(where.at(None), len(order)), where.line or 0) if where else (len(order), 0)

    listed = list(dict.fromkeys(sorted(problems, key=place)))
    return InputError(f"preset {preset}: {counted(len(listed), 'problem')}", problems=listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Summary of a runnable preset; if it cannot be loaded, `error` is set and most other fields are empty.

    `tis` is the cap of truncated importance sampling, None for another kind of weights or none. `gpus` is the total
    number of GPUs (0 on CPU), and `devices` the same as text: nodes × GPUs per node.
    """

    name: str
    description: str = ""
    model: str = ""
    advantage: str = ""
    rollout: str = ""
    tis: float | None = None
    gpus: int = 0
    devices: str = ""
    error: str | None = None


def catalog() -> Iterator[Summary]:
    """Yield a summary of every runnable preset on the search path, sorted by name."""
    for name in presets.names():
        try:
            yield _summary(name)
        except InputError as error:
            yield Summary(name=name, error=error.message)


def _summary(name: str) -> Summary:
    spec = read_spec(name).checked().spec
    return Summary(
        name=name,
        description=spec.description,
        model=spec.model.path,
        advantage=spec.algorithm.advantage,
        rollout=spec.rollout.precision,
        tis=spec.correction.cap if spec.correction.kind == "tis" else None,
        gpus=_gpus(spec.resources),
        devices=_devices(spec.resources),
    )


def _gpus(resources: ResourceSpec) -> int:
    return 0 if resources.platform == "cpu" else resources.all_devices


def _devices(resources: ResourceSpec) -> str:
    if resources.platform == "cpu":
        return "CPU"
    sides = [(resources.nodes, resources.gpus_per_node)]
    if resources.separate_devices:
        sides.append((resources.rollout_nodes or 1, resources.rollout_gpus_per_node or 1))
    return " + ".join(f"{nodes} × {gpus}" if nodes > 1 else str(gpus) for nodes, gpus in sides)
