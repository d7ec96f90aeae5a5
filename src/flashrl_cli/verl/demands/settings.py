"""What the rules of this package judge: a resolved spec, its overrides and verl's composed tree, with the derived sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flashrl_cli import contract
from flashrl_cli.errors import Problem
from flashrl_cli.verl.overrides import ACTOR, ENGINE, TABLE, Override
from flashrl_cli.verl.quoting import quote

if TYPE_CHECKING:
    from flashrl_cli.config.resolve import Resolved
    from flashrl_cli.config.spec import RunSpec
    from flashrl_cli.verl.compose import Tree

REF = "actor_rollout_ref.ref"
MODEL = "actor_rollout_ref.model"
FIELDS = {entry.key: entry.field for entry in TABLE}
SEQUENCE_PARALLEL = {
    # The first above 1 counts (verl/workers/config/actor.py:331); the critic's other key is never read.
    "actor": (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size"),
    "reference policy": (f"{REF}.ulysses_sequence_parallel_size", f"{REF}.fsdp_config.ulysses_sequence_parallel_size"),
    "critic": ("critic.fsdp.ulysses_sequence_parallel_size",),
}
"""Keys of each trained (or scored) model's sequence-parallel degree."""


class Shape(Protocol):
    """The numbers of a model's config.json that rules need (`fit.shape.ModelShape` has them)."""

    @property
    def architecture(self) -> str:
        """Its `model_type`."""
        ...

    @property
    def hidden(self) -> int:
        """Width of the hidden state."""
        ...

    @property
    def heads(self) -> int:
        """Query heads."""
        ...

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        ...

    @property
    def intermediate(self) -> int:
        """Width of the dense MLP."""
        ...

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence."""
        ...

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        ...

    @property
    def expert_intermediate(self) -> int:
        """Width of one expert."""
        ...

    @property
    def shared_intermediate(self) -> int:
        """Width of the expert that sees every token; 0 for none."""
        ...

    @property
    def dense_layers(self) -> int:
        """Layers of a mixture of experts that have a dense MLP."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a rule may ask. `shape` is None where the model is not known on this machine."""

    resolved: Resolved
    overrides: Sequence[Override]
    tree: Tree
    shape: Shape | None = None

    @property
    def spec(self) -> RunSpec:
        """The typed spec."""
        return self.resolved.spec

    def get(self, key: str) -> Any:
        """Value of verl's key after composition, defaults included; None where there is none."""
        return self.tree.get(key)

    def size(self, key: str) -> int | None:
        """A whole number at the key; None for anything else."""
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def where(self, *keys: str) -> str | None:
        """Where the first of these keys (or fields) that a person set was written; an option given for this run before any preset."""
        written = {**self.resolved.origins, **{override.key: override.origin for override in self.overrides}}
        origins = [written[key] for key in keys if key in written]
        for layers in (("set", "option"), ("preset",)):
            for origin in origins:
                if origin.layer in layers:
                    return origin.where
        return None

    def name(self, key: str) -> str:
        """The key as a person writes it: the typed field that becomes it, or `verl.KEY`."""
        return FIELDS.get(key, f"verl.{key}")

    def fix(self, key: str, value: Any, *, new: bool = False) -> str:
        """The option that sets the key; `new` for one that verl's tree lacks."""
        name = FIELDS.get(key, f"verl.{'+' if new else ''}{key}")
        text = str(value).lower() if isinstance(value, bool) else quote(value)
        return f"--set '{name}={text}'" if "[" in text else f"--set {name}={text}"

    def problem(self, message: str, hint: str, *keys: str) -> Problem:
        """A problem that was written at the first of `keys` that a person set."""
        return Problem(message, self.where(*keys), hint)

    @property
    def gpus(self) -> int:
        """Devices (trainer processes) of the run."""
        return self.spec.resources.nodes * self.spec.resources.gpus_per_node

    @property
    def engine_gpus(self) -> int:
        """Devices an engine takes (verl/workers/rollout/replica.py:107)."""
        return self.spec.rollout.tensor_parallel * (self.size("actor_rollout_ref.rollout.data_parallel_size") or 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that can come back from the engine."""
        data = self.spec.data
        both = data.max_prompt_length + data.max_response_length
        return min(both, self.spec.rollout.max_model_len or both)

    @property
    def has_critic(self) -> bool:
        """Whether verl trains a critic (verl/trainer/ppo/utils.py:96)."""
        enabled = self.get("critic.enable")
        return bool(enabled) if enabled is not None else self.spec.algorithm.advantage == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether verl scores a reference policy (verl/trainer/ppo/utils.py:75)."""
        return self.spec.algorithm.kl_loss or self.spec.algorithm.kl_in_reward

    @property
    def has_adapter(self) -> bool:
        """Whether the policy trains LoRA; the reference policy is then the policy without it."""
        return (self.size(f"{MODEL}.lora_rank") or 0) > 0

    @property
    def refits_with_flashrl(self) -> bool:
        """Whether the engine's weights come through flashrl's worker extension."""
        return bool(self.get(f"{ENGINE}.worker_extension_cls") == contract.WORKER_EXTENSION)

    def sequence_parallel(self, role: str) -> int:
        """Devices that share a sequence in the training of `role`."""
        degrees = [self.size(key) or 1 for key in SEQUENCE_PARALLEL[role]]
        return next((degree for degree in degrees if degree > 1), 1)

    def data_parallel(self, role: str) -> int | None:
        """Shares that a batch of `role` is split into; None where sequence parallelism does not fit the devices."""
        degree = self.sequence_parallel(role)
        return self.gpus // degree if self.gpus % degree == 0 else None

    def roles(self) -> Iterator[str]:
        """Models that verl builds for training: a key of SEQUENCE_PARALLEL each."""
        yield "actor"
        if self.has_reference and not self.has_adapter:
            yield "reference policy"
        if self.has_critic:
            yield "critic"


Rule = Callable[[Settings], Iterator[Problem]]


def largest_divisor(number: int, at_most: int) -> int:
    """Largest divisor of `number` that is not above `at_most`."""
    return max(d for d in range(1, max(at_most, 1) + 1) if number % d == 0)
