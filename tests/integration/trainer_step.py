"""Steps of verl's own trainer in one process, for many corrections, losses and advantages. Usage: JOB.json.

An INT8 engine samples responses of the tiny policy. The trainer's policy is that one with noise on its weights, as if
it were some updates ahead, so that importance weights lie well to both sides of 1. With each combination's
configuration, as `flashrl train` gives it to verl, `PPOTrainerSync._step_once` and `_compute_metrics` run
(verl/trainer/ppo/v1/trainer_base.py:562, 1868): old log-probs, a critic's values, correction, advantages, and the
updates of critic and policy, in two mini-batches of two passes each. Only Ray and TransferQueue's storage are replaced:
a worker is called where Ray would pass the call on, and the batch is kept in a dictionary.

What verl did is compared with tests/correction_formulas.py, and its log-probs and gradients with those of the same rows
by a model of Transformers in float64. The bounds of weights and of rejection are chosen so that they act on these
samples: options have their names in braces (`bounds_of`). The job has the policy's folder, which is overwritten, the
data, the combinations with their batch and options, and whether Hydra is to compose each configuration. Writes the
"out" file: for each combination the reason why it is refused, or how far off it was.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import json
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch  # noqa: TID253  (a script for which nothing works without it)

from flashrl_cli.config.resolve import Options
from flashrl_cli.errors import InputError
from flashrl_cli.train import launch
from flashrl_cli.verl import compose

if TYPE_CHECKING:
    from tests import correction_formulas as formulas
else:
    # some package installs a `tests` of its own, and this is a script: its path has the folder above
    import correction_formulas as formulas

PROMPTS, N = 4, 4
NOISE = 0.1
"""Standard deviation of the noise on the policy's weights, relative to that of each tensor."""
REWARDS = (0.0, 0.5, 1.0, 2.0)
SIZES = (
    f"data.train_batch_size={PROMPTS}", f"rollout.n={N}", "algorithm.mini_batch_size=2",
    "algorithm.micro_batch_size_per_gpu=4", "rollout.log_prob_micro_batch_size_per_gpu=16", "algorithm.lr=1e-3",
    "watch.max_weight_deviation=1", "watch.max_rejected=1",
)  # fmt: skip
"""Two mini-batches, the first of which moves the policy so far that the second has ratios beyond the losses' bounds."""
PARTITION = "train"
END = 258
"""The tiny policy's token for the end of a message."""
Result = dict[str, Any]


class Sampled(NamedTuple):
    """A response with its tokens' log-probs in the rollout."""

    prompt: list[int]
    response: list[int]
    log_probs: list[float]
    reward: float


def sampled(model: str, data: str) -> list[Sampled]:
    """Responses of an INT8 engine to the first prompts of the data, of different lengths, with rewards by chance."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from flashrl_cli.precision import INT8

    render = AutoTokenizer.from_pretrained(model).apply_chat_template
    rows = pq.read_table(data, columns=["prompt"]).slice(0, PROMPTS).to_pylist()
    prompts = [render(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False) for row in rows]
    engine = LLM(
        model=model, quantization=INT8.method, dtype="bfloat16", enforce_eager=True, max_model_len=128,
        gpu_memory_utilization=0.1, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    draw, asked, inputs = random.Random(0), [], []
    for number in range(PROMPTS * N):
        asked.append(SamplingParams(temperature=1.0, max_tokens=draw.randint(3, 16), logprobs=0, seed=number))
        inputs.append({"prompt_token_ids": prompts[number // N]})
    found = []
    for output in engine.generate(inputs, asked, use_tqdm=False):
        ids = list(map(int, output.outputs[0].token_ids))
        values = [at[token].logprob for at, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        found.append(Sampled(list(output.prompt_token_ids), ids, values, draw.choice(REWARDS)))
    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()  # verl makes a process group of its own
    return found


def changed(samples: Sequence[Sampled], batch: str) -> list[Sampled]:
    """The samples, or a batch that is hard to take; verl fills one of fewer responses up."""
    if batch == "equal rewards":
        return [one._replace(reward=1.0) for one in samples]
    if batch == "no rewards":
        return [one._replace(reward=0.0) for one in samples]
    if batch == "far":
        return [one._replace(log_probs=[value - 3 for value in one.log_probs]) for one in samples]
    if batch == "filled up":
        return list(samples[:-2])
    return list(samples)


def move(model: str) -> None:
    """Add noise to a policy's weights in its folder."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    make = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.dim() > 1:
                weight.add_(NOISE * weight.std() * torch.randn(weight.shape, generator=make))
    policy.save_pretrained(model)


def bounds_of(samples: Sequence[Sampled], exact: torch.Tensor) -> dict[str, str]:
    """A bound for each kind of weights and each rejection, beyond which some of these samples are, and not all.

    Each is in a gap between two samples, so that rounding moves none across it.
    """
    rollout, mask = torch.zeros_like(exact), torch.zeros_like(exact)
    for row, one in enumerate(samples):
        rollout[row, : len(one.response)], mask[row, : len(one.response)] = torch.tensor(one.log_probs), 1.0
    nothing = torch.zeros_like(exact)
    batch = formulas.Batch(mask=mask, old=exact, rollout=rollout, rewards=nothing, values=nothing, groups=())
    w, products = batch.log_w.exp()[mask.bool()], batch.log_w.sum(-1).exp()
    found = {"above 1": gap(w[w > 1]), "below 1": gap(-w[w < 1])[1:], "of products": gap(products)}
    for by, estimator in itertools.product(("token", "seq-sum", "seq-mean", "seq-max"), ("k1", "k2", "k3")):
        values = formulas.estimates(by, estimator, batch)
        values = values[mask.bool()] if by == "token" else values[:, 0]
        if estimator != "k1":
            bounds = ("null", gap(values))
        elif 2 * (values > 1).sum() > len(values):
            bounds = ("1e-6", gap(values[values > 1]))
        else:
            bounds = (gap(-values[values < 1])[1:], "1e6")
        found[f"{by} {estimator} lower"], found[f"{by} {estimator} upper"] = bounds
    return found


def gap(values: torch.Tensor) -> str:
    """The middle of the widest gap between two of the values that two fifths to four fifths of them do not reach."""
    ordered = values.sort().values
    first, last = (int(len(ordered) * share) for share in (0.4, 0.8))
    widest = first + int(ordered[first : last + 2].diff().argmax())
    return f"{ordered[widest : widest + 2].mean().item():.9g}"


# Between trainer and workers.


class Storage:
    """TransferQueue's client with the rows in this process, which its own functions and verl's call."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self._keys: list[str] = []
        self._tags: dict[str, dict[str, Any]] = {}

    @staticmethod
    def _run_coroutine(coroutine: Any) -> Any:
        import asyncio

        from verl.utils.transferqueue_utils import _get_async_bridge_loop

        return asyncio.run_coroutine_threadsafe(coroutine, _get_async_bridge_loop()).result()

    async def async_kv_retrieve_meta(self, keys: Sequence[str], partition_id: str, create: bool) -> Any:
        assert partition_id == PARTITION
        for key in keys:
            if key not in self.rows:
                assert create
                self._keys.append(key)
                self.rows[key], self._tags[key] = {}, {}
        return self._meta(list(keys), {})

    async def async_kv_retrieve_keys(self, global_indexes: Sequence[int], partition_id: str) -> list[str]:
        assert partition_id == PARTITION
        return [self._keys[index] for index in global_indexes]

    async def async_put(self, data: Any, metadata: Any, data_parser: None = None) -> Any:
        keys = [self._keys[index] for index in metadata.global_indexes]
        for name, values in data.items():
            rows = values.unbind() if isinstance(values, torch.Tensor) else values.tolist()
            for key, value in zip(keys, rows, strict=True):
                self.rows[key][name] = value.clone() if isinstance(value, torch.Tensor) else value
        for key, tag in zip(keys, metadata.custom_meta, strict=True):
            self._tags[key] |= tag
        return self._meta(keys, metadata.extra_info)

    async def async_get_data(self, metadata: Any) -> Any:
        keys = [self._keys[index] for index in metadata.global_indexes]
        return self._packed(keys, metadata.field_names)

    def of(self, name: str) -> torch.Tensor:
        """A field of the samples in their order, padded with 0, without the rows by which verl fills a batch up."""
        rows = [self.rows[key][name] for key in self._keys if not self._tags[key].get("is_padding")]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def prompts(self) -> list[str]:
        """The prompts of the samples in their order."""
        return [self.rows[key]["uid"] for key in self._keys if not self._tags[key].get("is_padding")]

    def _packed(self, keys: Sequence[str], names: Sequence[str]) -> Any:
        from tensordict import TensorDict
        from transfer_queue.storage.managers.simple_storage_manager import AsyncSimpleStorageManager

        pack = AsyncSimpleStorageManager._pack_field_values
        fields = {name: pack([self.rows[key][name] for key in keys]) for name in names}
        return TensorDict(fields, batch_size=[len(keys)])

    def _meta(self, keys: Sequence[str], extra: dict[str, Any]) -> Any:
        from transfer_queue import BatchMeta
        from transfer_queue.metadata import extract_field_schema

        names = list(self.rows[keys[0]])
        return BatchMeta(
            [self._keys.index(key) for key in keys],
            [PARTITION] * len(keys),
            extract_field_schema(self._packed(keys, names)) if names else {},
            production_status=[1] * len(keys),
            extra_info=extra,
            custom_meta=[self._tags[key] for key in keys],
        )


class Group:
    """A group of one worker, whose methods are called in this process; `waits` if they return no futures."""

    def __init__(self, worker: Any, mesh: str, *, waits: bool) -> None:
        self._worker, self._waits = worker, waits
        self._dispatch_info = {mesh: [0]}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._worker, name)

        def future(*args: Any) -> Any:
            found = method(*args)
            return SimpleNamespace(futures=[], get=lambda: found)

        return method if self._waits else future


class Pass(NamedTuple):
    """What the loss of a pass got: the rows of the batch, the new log-probs of their responses, padded, and its size.

    The size counts rows by which verl fills a batch up, too.
    """

    rows: list[int]
    new: torch.Tensor
    size: int


class Update(NamedTuple):
    """A mini-batch's passes, the weights that they had, and the gradient that the optimizer got."""

    passes: list[Pass]
    weights: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor of a model that FSDP has sharded for one process."""
    found: torch.Tensor = tensor.detach()
    return (found.to_local() if hasattr(found, "to_local") else found).clone()


def weights_of(worker: Any) -> dict[str, torch.Tensor]:
    return {name: local(weight) for name, weight in worker.actor.engine.module.named_parameters()}


def recorded(worker: Any) -> list[Update]:
    """The policy's updates, recorded as they are made."""
    from verl.workers.utils.padding import no_padding_2_padding

    found: list[Update] = []
    passes: list[Pass] = []
    training, engine = worker.actor, worker.actor.engine
    loss, step = training.loss_fn, engine.optimizer_step

    def noted_loss(*, model_output: Any, data: Any, **more: Any) -> Any:
        new = no_padding_2_padding(model_output["log_probs"], data).detach().clone()
        real = data["loss_mask"].to_padded_tensor(0).any(-1)
        passes.append(Pass(data["row"].values()[real].tolist(), new[real], len(new)))
        return loss(model_output=model_output, data=data, **more)

    def noted_step() -> Any:
        gradient = {name: local(weight.grad) for name, weight in engine.module.named_parameters()}
        found.append(Update(passes.copy(), weights_of(worker), gradient))
        passes.clear()
        return step()

    training.set_loss_fn(noted_loss)
    engine.optimizer_step = noted_step
    return found


def critic_of(tree: Any) -> Any:
    """verl's worker that trains the critic, made as `PPOTrainer._setup` does (trainer_base.py:264)."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig
    from verl.workers.utils.losses import value_loss

    config = omega_conf_to_dataclass(tree.critic)
    config.engine.infer_max_token_len_per_gpu = config.ppo_infer_max_token_len_per_gpu
    config.engine.max_token_len_per_gpu = config.ppo_infer_max_token_len_per_gpu
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="value_model",
            model_config=config.model,
            engine_config=config.engine,
            optimizer_config=config.optim,
            checkpoint_config=config.checkpoint,
        )
    )
    worker.reset()
    worker.set_loss_fn(functools.partial(value_loss, config=config))
    return worker


def trainer_of(tree: Any) -> tuple[Any, Any]:
    """verl's trainer of a configuration, set up for a step, and its worker that trains the policy."""
    from verl.trainer.ppo.utils import need_critic
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.workers.engine_workers import ActorRolloutRefWorker

    made = object.__new__(PPOTrainerSync)
    made.config, made.tokenizer, made.global_steps = tree, SimpleNamespace(eos_token_id=END), 1
    made.use_critic, made.use_reference_policy, made.ref_in_actor = need_critic(tree), False, False
    made.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=())
    made.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None)
    made.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)
    made.curr_step_profile, made._rollout_moe_lb_metrics_accumulator = False, None
    worker = ActorRolloutRefWorker(tree.actor_rollout_ref, "actor")
    worker.init_model()
    made.actor_rollout_wg = Group(worker, "actor", waits=True)
    if made.use_critic:
        made.critic_wg = Group(critic_of(tree), "train", waits=False)
    return made, worker


def put(samples: Sequence[Sampled]) -> tuple[Any, Storage]:
    """The batch of samples as verl's agent loops put it (trainer/ppo/v1/agent_loop_tq.py:160), and where it is."""
    import transfer_queue as tq
    from transfer_queue import interface
    from verl.utils import transferqueue_utils
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    storage = Storage()
    interface._TQ_CLIENT, transferqueue_utils.TQ_INITIALIZED = storage, True
    fields, keys, tags = [], [], []
    for number, (prompt, response, log_probs, reward) in enumerate(samples):
        ids, mask = torch.tensor(prompt + response), torch.ones(len(response), dtype=torch.int64)
        scores = torch.zeros(len(response))
        scores[-1] = reward
        fields.append(
            {
                "prompts": ids[: len(prompt)], "responses": ids[len(prompt) :], "input_ids": ids,
                "position_ids": torch.arange(len(ids)), "response_mask": mask, "loss_mask": mask,
                "rollout_log_probs": torch.tensor(log_probs), "rm_scores": scores, "row": torch.tensor([number]),
                "num_turns": 2, "uid": f"prompt{number // N}", "multi_modal_inputs": {},
            }
        )  # fmt: skip
        keys.append(f"prompt{number // N}_{number % N}_0")
        tags.append({"seq_len": len(ids), "min_global_steps": 0, "max_global_steps": 0})
    return tq.kv_batch_put(keys, PARTITION, list_of_dict_to_tensordict(fields), tags), storage


# The same by formulas.


class Policy:
    """A model of Transformers in float64."""

    def __init__(self, folder: str, samples: Sequence[Sampled]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self._samples = samples

    def log_probs(self, rows: Sequence[int]) -> torch.Tensor:
        """Log-probs of the responses of some rows, padded with 0 to the longest of the batch."""
        chosen = [self._samples[row] for row in rows]
        longest = max(len(one.response) for one in self._samples)
        # padded on the right, where nothing is seen from before it
        ids = [torch.tensor(one.prompt + one.response) for one in chosen]
        logits = self._model(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)).logits.log_softmax(-1)
        found = []
        for row, (prompt, response, *_) in zip(logits, chosen, strict=True):
            of_response = row[len(prompt) - 1 : len(prompt) + len(response) - 1]
            values = of_response.gather(-1, torch.tensor(response)[:, None])[:, 0]
            found.append(torch.nn.functional.pad(values, (0, longest - len(values))))
        return torch.stack(found)

    def gradient(self, update: Update, loss: Callable[[Pass, torch.Tensor], torch.Tensor]) -> tuple[float, Any, float]:
        """The loss of a mini-batch, its gradient by the weights' names, and how far verl's log-probs were off.

        The losses are those of verl's log-probs, which lie on the same side of every bound, and have the gradient of
        this model's.
        """
        self._model.load_state_dict({name: weight.double() for name, weight in update.weights.items()}, strict=False)
        self._model.zero_grad()
        own = self.log_probs([row for one in update.passes for row in one.rows])
        total, off = torch.zeros((), dtype=torch.float64), 0.0
        for one, of_pass in zip(update.passes, own.split([len(one.rows) for one in update.passes]), strict=True):
            theirs = torch.nn.functional.pad(one.new.double(), (0, own.shape[1] - one.new.shape[1]))
            off = max(off, (of_pass - theirs).abs().max().item())
            total = total + loss(one, theirs + (of_pass - of_pass.detach()))
        total.backward()
        return total.item(), {name: weight.grad for name, weight in self._model.named_parameters()}, off


def compared(
    storage: Storage, updates: Sequence[Update], metrics: dict[str, Any], spec: Any, policy: Policy, exact: torch.Tensor
) -> Result:
    """How far a step is from the formulas: absolute errors, and those of gradients relative to their norm."""
    mask = storage.of("loss_mask").float()
    old, rewards = storage.of("old_log_probs"), storage.of("rm_scores")
    values = storage.of("values") if "values" in next(iter(storage.rows.values())) else torch.zeros_like(rewards)
    rollout, prompts = storage.of("rollout_log_probs"), storage.prompts()
    groups = tuple(prompts.count(prompt) for prompt in dict.fromkeys(prompts))
    batch = formulas.Batch(mask=mask, old=old, rollout=rollout, rewards=rewards, values=values, groups=groups)
    correction, loss = spec.correction, spec.algorithm.loss
    weights, kept = formulas.weights(correction, batch), formulas.kept(correction.reject, batch)
    advantages = formulas.ADVANTAGES[spec.algorithm.advantage](batch, kept)
    found: Result = {
        "old": (old - exact[: len(old)]).abs().max().item(),
        "kept": (storage.of("response_mask") - kept).abs().max().item(),
        "advantages": ((storage.of("advantages") - advantages) * kept).abs().max().item(),
        "weights": float((weights is None) != ("rollout_is_weights" not in next(iter(storage.rows.values())))),
        "rejected": 1 - (kept.sum() / mask.sum()).item(),
        "cut": 0.0,
    }
    if weights is not None:
        found["weights"] = ((storage.of("rollout_is_weights") - weights) * kept).abs().max().item()
        found["cut"] = ((weights - batch.log_w.exp()).abs() > 1e-3)[mask.bool()].double().mean().item()
    losses, errors, norms, offs = [], [], [], []
    for update in updates:
        rows = [row for one in update.passes for row in one.rows]
        size = {"tokens": int(mask[rows].sum()), "responses": sum(one.size for one in update.passes)}

        def part(one: Pass, new: torch.Tensor, size: dict[str, int] = size) -> torch.Tensor:
            inside = kept[one.rows]
            of_tokens = formulas.losses(loss, new, old[one.rows], advantages[one.rows], inside)
            return formulas.mean(loss, of_tokens, inside, None if weights is None else weights[one.rows], **size)

        value, gradient, off = policy.gradient(update, part)
        difference = torch.stack([(gradient[name] - update.gradient[name]).norm() for name in gradient]).norm()
        norms.append(torch.stack([one.norm() for one in gradient.values()]).norm().item())
        errors.append(difference.item() / norms[-1] if norms[-1] else difference.item())
        losses.append(value)
        offs.append(off)
    return found | {
        "new": max(offs),
        "loss": abs(sum(losses) / len(losses) - metrics["actor/pg_loss"]),
        "losses": losses,
        "gradients": errors,
        "norms": norms,
        "norm": abs(sum(norms) / len(norms) - metrics["actor/grad_norm"]),
    }


# One combination after another.


def composed(overrides: Sequence[Any]) -> Any:
    """verl's configuration under a plan's overrides, as after a composition, which takes 0.3 s."""
    from omegaconf import OmegaConf

    tree = copy.deepcopy(verls_own())
    for override in overrides:
        OmegaConf.update(tree, override.key, override.value, merge=False, force_add=True)
    return tree


@functools.cache
def verls_own() -> Any:
    return compose.tree(["actor_rollout_ref.rollout.name=vllm"])._config


def configured(sets: Sequence[str], *, by_hydra: bool) -> tuple[Any, Any]:
    """The spec and verl's configuration of a run with these options. Raises InputError where it is refused."""
    resolved, plan = launch.preview("tiny", Options(sets=(*SIZES, *sets)))
    return plan.spec, launch.judge(resolved, plan)._config if by_hydra else composed(plan.overrides)


def step(spec: Any, tree: Any, samples: Sequence[Sampled], policy: Policy, exact: torch.Tensor) -> Result:
    """A step of one combination, and how far it is from the formulas."""
    torch.manual_seed(0)
    trainer, worker = trainer_of(tree)
    batch, storage = put(samples)
    trainer.replay_buffer = SimpleNamespace(sample=lambda **_: (batch, {}))
    updates = recorded(worker)
    metrics: dict[str, Any] = {}
    timing: dict[str, float] = {}
    before = weights_of(worker)
    trained = trainer._step_once(metrics, timing, len(samples))
    trainer._compute_metrics(trained, metrics, {"step": 1.0, **timing}, 1, 0)
    after = weights_of(worker)
    numbers = {name: float(value) for name, value in metrics.items() if not name.startswith(("perf/", "timing"))}
    found = {
        "passes": [len(update.passes) for update in updates],
        "moved": max((after[name] - before[name]).abs().max().item() for name in after),
        "finite": all(weight.isfinite().all().item() for weight in after.values()),
        "metrics": numbers,
    }
    return found | compared(storage, updates, numbers, spec, policy, exact)


def run(job: dict[str, Any]) -> Result:
    samples = sampled(job["model"], job["data"])
    move(job["model"])
    import verl.trainer.ppo.v1.trainer_base as verls

    verls.ray = SimpleNamespace(get=list)  # of a critic's futures
    verls.SkipManager.set_step(1)
    policy = Policy(job["model"], samples)
    with torch.no_grad():
        exact = policy.log_probs(range(len(samples)))
    bounds = bounds_of(samples, exact)
    gc.collect()
    gc.freeze()  # verl's workers collect garbage when they start: 0.4 s each among all that is imported here
    found: Result = {}
    for name, (batch, sets) in job["combinations"].items():
        try:
            spec, tree = configured([text.format_map(bounds) for text in sets], by_hydra=job["hydra"])
            found[name] = step(spec, tree, changed(samples, batch), policy, exact)
        except InputError as error:
            found[name] = {"refused": [problem.message for problem in error.problems]}
        except Exception:  # noqa: BLE001  (of any library: the other combinations are tried, too)
            found[name] = {"crashed": traceback.format_exc()}
    return found


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["out"]).write_text(json.dumps(run(asked)), encoding="utf-8")
