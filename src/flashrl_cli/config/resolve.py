"""From a preset and the command line to a checked RunSpec that knows where each value came from.

In reading order: values that follow from others, the rules between the values of a spec, the options of the command
line as layers over a preset, reading it all, and a summary of each preset. Nothing here knows of verl: what verl itself
demands is judged in `verl.lint`.

To add a rule, write a generator over RunSpec and list it in RULES.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from flashrl_cli.config import diagnose, presets, yaml_file
from flashrl_cli.config.layers import DEFAULT, Layer, Origin, leaves, merge, nested, option
from flashrl_cli.config.presets import VERBATIM
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError, Location, Problem
from flashrl_cli.precision import PRECISIONS, SMOOTHED
from flashrl_cli.secrets import looks_secret
from flashrl_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic_core import ErrorDetails

    from flashrl_cli.config.diagnose import Translate
    from flashrl_cli.config.spec import ResourceSpec


def derived_layers(spec: RunSpec) -> Iterator[Layer]:
    """Yield a layer for every key that is null and whose value follows from others."""
    critic, trains_critic = spec.critic, spec.algorithm.advantage == "gae"
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    if spec.rollout.max_model_len is None:
        yield _derived("rollout.max_model_len", longest, "data.max_prompt_length + data.max_response_length")
    if trains_critic and critic.path is None:
        yield _derived("critic.path", spec.model.path, "model.path")
    if trains_critic and critic.max_tokens_per_gpu is None and critic.micro_batch_size_per_gpu is not None:
        tokens = critic.micro_batch_size_per_gpu * longest
        yield _derived("critic.max_tokens_per_gpu", tokens, "critic.micro_batch_size_per_gpu full-length responses")


def _derived(key: str, value: int | str, reason: str) -> Layer:
    return Layer(Origin("derived", reason=reason), nested(key, value))


class Violation(NamedTuple):
    """A broken rule: the key to look at, what is wrong, and the fix: text, or values of keys (one is enough)."""

    key: str
    message: str
    hint: str = ""
    fix: Mapping[str, Any] = {}


Rule = Callable[[RunSpec], Iterator[Violation]]


def mini_batch_divides_batch(spec: RunSpec) -> Iterator[Violation]:
    """A step's prompts are divided evenly among its optimizer steps."""
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


def group_has_members(spec: RunSpec) -> Iterator[Violation]:
    """GRPO compares responses to one prompt; with a single one every advantage is 0."""
    if spec.algorithm.advantage == "grpo" and spec.rollout.n == 1:
        yield Violation("rollout.n", "GRPO needs more than one response a prompt", fix={"rollout.n": 8})


def filtered_groups_vary(spec: RunSpec) -> Iterator[Violation]:
    """A group of one has no spread: nothing would ever be filtered (GRPO says more, above)."""
    if spec.algorithm.filter_groups.enable and spec.rollout.n == 1 and spec.algorithm.advantage != "grpo":
        yield Violation(
            "algorithm.filter_groups.enable",
            "filters nothing with one response a prompt",
            fix={"rollout.n": 8, "algorithm.filter_groups.enable": False},
        )


def metrics_are_written(spec: RunSpec) -> Iterator[Violation]:
    """The table, the guard and `runs` read verl's file logger."""
    if "file" not in spec.trainer.logger:
        shown = ",".join((*spec.trainer.logger, "file"))
        yield Violation("trainer.logger", "lacks file, which flashrl reads", fix={"trainer.logger": f"[{shown}]"})


def overlong_fits(spec: RunSpec) -> Iterator[Violation]:
    """A penalty needs the manager that applies it and fits into the response (verl asserts so in a worker)."""
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


def dual_clip_bounds_from_above(spec: RunSpec) -> Iterator[Violation]:
    """Dual clip bounds the loss of ratios above 1 (arXiv 1912.09729, eq. 5); verl asserts it in the first update."""
    if spec.algorithm.clip_c <= 1:
        yield Violation("algorithm.clip_c", f"{spec.algorithm.clip_c:g} is not above 1", fix={"algorithm.clip_c": 3.0})


def warmup_ends(spec: RunSpec) -> Iterator[Violation]:
    """In the warm-up the policy does not learn: it needs a critic that does, and an end within the run."""
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


def engine_holds_a_sequence(spec: RunSpec) -> Iterator[Violation]:
    """The engine silently ends a response at the length of its longest sequence."""
    longest = spec.data.max_prompt_length + spec.data.max_response_length
    held = spec.rollout.max_model_len
    if held is not None and held < longest:
        yield Violation(
            "rollout.max_model_len",
            f"{held} is less than data.max_prompt_length + data.max_response_length = {longest}",
            fix={"rollout.max_model_len": longest},
        )


def engine_batches_its_sequences(spec: RunSpec) -> Iterator[Violation]:
    """A decoding step takes a token of every running sequence (vLLM refuses less: vllm/config/scheduler.py:263)."""
    tokens, sequences = spec.rollout.max_num_batched_tokens, spec.rollout.max_num_seqs
    if tokens < sequences:
        yield Violation(
            "rollout.max_num_batched_tokens",
            f"{tokens} is less than rollout.max_num_seqs = {sequences}",
            fix={"rollout.max_num_seqs": tokens},
        )


def mix_has_two_precisions(spec: RunSpec) -> Iterator[Violation]:
    """Some replicas in bf16 and the others quantized, by methods that know their replica: verl's own does not."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.mix and "mix" not in row.goes_with:
        why = f"{row.name} is for all replicas alike" if row.quantized else f"every replica is in {row.name} already"
        yield Violation("rollout.mix", why, fix={"rollout.precision": row.sibling})


def logits_are_proven(spec: RunSpec) -> Iterator[Violation]:
    """Logits in float32 are proven at flashrl's own weight update."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.lm_head_fp32 and "head32" not in row.goes_with:
        why = f"{row.name} rollouts do not know it"
        yield Violation("rollout.lm_head_fp32", why, fix={"rollout.precision": row.sibling})


def cache_in_8_bits_has_scales(spec: RunSpec) -> Iterator[Violation]:
    """The scales of an FP8 cache come with flashrl's own weight update (plugins/kv_scales.py)."""
    row = PRECISIONS[spec.rollout.precision]
    if spec.rollout.kv_cache != "auto" and "kv8" not in row.goes_with:
        yield Violation(
            "rollout.kv_cache",
            f"{spec.rollout.kv_cache} needs flashrl's own weight update, and {row.name} has verl's",
            fix={"rollout.precision": row.sibling, "rollout.kv_cache": "auto"},
        )


def profile_is_applied(spec: RunSpec) -> Iterator[Violation]:
    """Smoothing only reduces quantization error, and verl's own weight update does not apply it."""
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
    """A preset is shared, and a plan is kept with the run: neither may hold a credential."""
    named = {f"env.{name}": (name, value) for name, value in spec.env.items()}
    # among verl's keys only capitals distinguish a variable's name from a key like `pad_token`
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


EXAMPLE = "--set algorithm.lr=1e-6"
SWEPT = {"rollout": "rollout.precision", "tis": "correction.cap"}
"""A sweep's own names for keys that have an option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line's part of a configuration.

    `rollout` is a precision, `tis` the text of a cap or `off`, `sets` are texts `key=value`, `point` is what `--sweep`
    gives this run: a text for each key that varies.
    """

    rollout: str | None = None
    tis: str | None = None
    sets: Sequence[str] = ()
    point: Sequence[tuple[str, str]] = ()

    def __bool__(self) -> bool:
        return bool(self.rollout or self.tis or self.sets or self.point)


NO_OPTIONS = Options()


def option_layers(options: Options, problems: list[Problem]) -> Iterator[Layer]:
    """Yield a layer for each option given, the strongest last; a bad text is a problem and its layer empty."""
    if options.rollout is not None:
        yield _flag("rollout.precision", options.rollout, Location("--rollout"))
    if options.tis is not None:
        yield _flag("correction.cap", options.tis, Location("--tis"))
    for text in options.sets:
        key = text.partition("=")[0].strip()
        shown = key if "=" in text and all(key.split(".")) else text
        where = Location("--set", key=shown if shown.isprintable() else ascii(shown))
        yield _assignment(text, where, problems)
    for key, text in options.point:
        where = Location("--sweep", key=key)
        if key in SWEPT:
            item = yaml_file.value(text).data  # a list's item may be quoted; an option's text is not
            yield _flag(SWEPT[key], item if isinstance(item, str) else text, where)
        else:
            yield _assignment(f"{key}={text}", where, problems)


def is_text(key: str) -> bool:
    """Whether a key's value is a text whatever it looks like: that of a variable, `env.NAME`."""
    head, dot, _ = key.partition(".")
    return bool(dot) and head in VERBATIM


def _flag(key: str, text: str, where: Location) -> Layer:
    return Layer(Origin("option", where), nested(key, _cap(text) if key == "correction.cap" else text))


def _cap(text: str) -> Any:
    """Number of a `--tis` text, None for `off`; anything else as it is, for the spec to refuse."""
    number = yaml_file.value(text).data
    if isinstance(number, int | float) and not isinstance(number, bool):
        return number
    return None if text == "off" else text


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
"""pydantic's name for a key that a model lacks."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A valid spec, the origin of each of its dotted leaf keys, and the problems that leave it valid.

    `broken` holds what could be left out (unknown keys, unreadable lines) or, where nothing was, the rules that values
    break.
    """

    spec: RunSpec
    origins: Mapping[str, Origin]
    preset: str = ""
    """The name or the file that the user gave."""
    layers: Sequence[Layer] = ()
    broken: tuple[Problem, ...] = ()

    def checked(self) -> Resolved:
        """Itself. Raises InputError with everything that is broken."""
        if self.broken:
            raise self.refusal(self.broken)
        return self

    def refusal(self, problems: Sequence[Problem]) -> InputError:
        """The error with `problems`, in the order of the files and options in which they were written."""
        return _refusal(self.preset, problems, self.layers)

    def value(self, key: str) -> Any:
        """Value at a dotted key of typed fields (not under `verl` or `env`); None below a part that is null."""
        value: Any = self.spec
        for name in key.split("."):
            value = getattr(value, name) if value is not None else None
        return value

    def is_set(self, key: str) -> bool:
        """Whether the value was written or derived, and is not merely the default."""
        return self.origins.get(key, DEFAULT).layer != "default"

    def option(self, key: str, value: Any) -> str:
        """The option that would give a key another value: that of the sweep for a key that the sweep varies."""
        return option(key, value, self.origins.get(key, DEFAULT).where)


def read_spec(preset: str, options: Options = NO_OPTIONS, translate: Translate = lambda _: None) -> Resolved:
    """Read a preset (name or file), apply the options, validate; problems that leave a valid spec are in the result.

    `translate` gives the hint to a key that the spec lacks and another program has. Reads preset files and the working
    folder. Raises InputError with every problem, each with its file and line or its option, in their order.
    """
    problems: list[Problem] = []
    read = [*presets.read_layers(preset, problems), *option_layers(options, problems)]
    layers = [diagnose.well_shaped(layer, problems) for layer in read]
    data, origins = merge(layers)
    errors = _errors(data)
    if errors:
        found = diagnose.problems_of(errors, origins, translate)
        # a key that is missing may be in a line that could not be read
        problems += [problem for problem in found if problem.where or not problems]
    unknown = [error["loc"] for error in errors if error["type"] == UNKNOWN]
    if len(unknown) < len(errors):
        raise _refusal(preset, problems, layers)
    spec = RunSpec.model_validate(_without(data, unknown))
    layers += derived_layers(spec)
    data, written = merge(layers)
    spec = RunSpec.model_validate(_without(data, unknown))
    # a rule may be broken only because something was left out
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
        """Number of the layer, and line; what was written nowhere comes last."""
        where = problem.where if isinstance(problem.where, Location) else None
        return (order.get(where.at(None), len(order)), where.line or 0) if where else (len(order), 0)

    listed = list(dict.fromkeys(sorted(problems, key=place)))
    return InputError(f"preset {preset}: {counted(len(listed), 'problem')}", problems=listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One runnable preset in a line; `error` is set (and most else empty) for one that does not load.

    `tis` is the cap of truncated importance sampling, `gpus` the number of GPUs in all (0 on CPU), `devices` the same
    as text: machines × GPUs on each.
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
    """Yield a summary of every preset on the search path, by name."""
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
        tis=spec.correction.cap,
        gpus=_gpus(spec.resources),
        devices=_devices(spec.resources),
    )


def _gpus(resources: ResourceSpec) -> int:
    return 0 if resources.platform == "cpu" else resources.devices


def _devices(resources: ResourceSpec) -> str:
    if resources.platform == "cpu":
        return "CPU"
    return f"{resources.nodes} × {resources.gpus_per_node}" if resources.nodes > 1 else str(resources.gpus_per_node)
