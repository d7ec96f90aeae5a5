"""RunSpec: the typed description of a training run, with a field for each setting that flashrl reasons about.

Each field's docstring is its documentation (docs/presets.md). The defaults are verl's own, which a contract test
checks, except where a docstring gives verl's. Every other verl key is given under `verl:` with verl's name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from flashrl_cli.paths import FOLDER_NAME
from flashrl_cli.precision import CacheName, PrecisionName

Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, Field(pattern=FOLDER_NAME)]
Tokens = Literal["auto"] | Count
Loss = Literal[
    "ppo", "gspo", "sapo", "cispo", "gpg", "dppo-tv", "dppo-kl", "clip-cov", "kl-cov", "gmpo", "dro"
]  # fmt: skip
Advantage = Literal[
    "gae", "reinforce-plus-plus", "grpo", "grpo-vectorized", "rloo", "rloo-vectorized", "opo", "gpg",
    "reinforce-plus-plus-baseline", "grpo-passk",
]  # fmt: skip
CorrectionKind = Literal["none", "tis", "icepop", "seq-tis"]
By = Literal["token", "seq-sum", "seq-mean", "seq-max"]
Estimator = Literal["k1", "k2", "k3"]
Scalar = bool | int | float | str | None


Texts = Text | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]


def _argument(value: object) -> object:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, bool | int | float | str | None) for item in items):
        raise ValueError("should be a value or a list of values")
    return value


def _verl_value(value: object) -> object:
    try:
        return _argument(value)
    except ValueError as error:
        raise ValueError(f"{error}; write deeper keys dotted: `a.b.c: value`") from None


VerlValue = Annotated[Scalar | list[Scalar], PlainValidator(_verl_value)]
Argument = Annotated[Scalar | list[Scalar], PlainValidator(_argument)]


class Part(BaseModel):
    """Base of all parts: immutable, no unknown keys, no guessing of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSpec(Part):
    """The policy."""

    path: Text
    """Hugging Face id, path of a folder (from `/`, `~` or `.`), or `prepared:NAME`: the model of that data set."""
    packing: bool = True
    """Policy and critic read the sequences of a pass end to end, without padding."""
    recompute: Literal["auto"] | bool = "auto"
    """Policy and critic save each layer's input only and compute the rest again for the backward pass (gradient
    checkpointing; verl's own default is true): a third more work for less memory. `auto` does so only where passes
    that are long enough to fill the GPU do not fit otherwise."""
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = "auto"
    """Attention of policy, reference policy and critic in training (verl's own default is flash_attention_2, which
    needs the flash-attn package). `varlen` is torch's own FlashAttention for packed sequences, `sdpa` torch's for
    padded ones. `auto` is flash_attention_2 where flash-attn is installed, varlen where it can be, and sdpa
    elsewhere."""


class DataSpec(Part):
    """Prompts and lengths. `train` and `val` name prepared data sets, or files by path (parquet, json, jsonl)."""

    train: Texts
    """Training prompts: `gsm8k` means `train.parquet` of the prepared data set gsm8k; a list mixes several."""
    val: Texts
    """Validation prompts: `gsm8k` means `test.parquet` of the prepared data set gsm8k."""
    shares: Annotated[tuple[Positive, ...], Field(strict=False)] | None = None
    """Shares of the data sets of `train`, in their order: `[3, 1]` for three times as many prompts of the first. An
    epoch has each row once at least; null for each row once."""
    max_prompt_length: Count
    """Longest prompt, in tokens."""
    max_response_length: Count
    """Longest response, in tokens."""
    train_batch_size: Count
    """Prompts a step (times `rollout.n` responses)."""
    filter_overlong: bool = False
    """Drop prompts longer than `max_prompt_length` before training."""

    @property
    def max_length(self) -> int:
        """Longest prompt and response together, in tokens."""
        return self.max_prompt_length + self.max_response_length

    @property
    def train_sets(self) -> tuple[str, ...]:
        """The data sets of `train`."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def val_sets(self) -> tuple[str, ...]:
        """The data sets of `val`."""
        return (self.val,) if isinstance(self.val, str) else self.val


class FilterGroups(Part):
    """DAPO's dynamic sampling: a group of responses that all score the same teaches nothing and is sampled anew."""

    enable: bool = False
    """Whether groups without spread are dropped and refilled."""
    metric: Text = "reward"
    """What must vary within a group: `reward`, or a field that the reward reports, such as `acc`."""
    max_inflight_batches: Count = 1
    """Prompts in flight at most, in units of `data.train_batch_size`."""


class AlgorithmSpec(Part):
    """Advantage, loss and optimizer of the policy."""

    advantage: Advantage
    """`gae` trains a critic; `reinforce-plus-plus` compares with the batch; all others compare the `rollout.n`
    responses to one prompt ([Correction](correction.md#advantages))."""
    normalize_by_std: bool = True
    """`grpo` and `grpo-passk`: divide the advantage by the group's standard deviation."""
    loss: Loss = "ppo"
    """Loss of the policy update ([Correction](correction.md#losses))."""
    lr: Positive
    """Learning rate of the policy."""
    mini_batch_size: Count
    """Prompts an optimizer step; divides `data.train_batch_size`."""
    micro_batch_size_per_gpu: Count | None = None
    """Responses a forward pass; null for batches by tokens."""
    max_tokens_per_gpu: Tokens | None = "auto"
    """Tokens a forward pass (verl batches by responses unless `use_dynamic_bsz` is set, and takes 16384 tokens then).
    `auto` is what the estimated memory allows, or null where `micro_batch_size_per_gpu` is given; null for batches by
    responses."""
    clip_low: NotNegative = 0.2
    """The ratio of probabilities is clipped at 1 - clip_low; what the bound means to another loss than `ppo`, and its
    value there unless it is set beside `loss` or later, is in [Correction](correction.md#losses)."""
    clip_high: NotNegative = 0.2
    """The ratio of probabilities is clipped at 1 + clip_high; see `clip_low`."""
    clip_c: Positive = 3.0
    """Dual clip (`ppo`): bound of the loss where the advantage is negative. `dppo-tv` and `dppo-kl`: cap of the ratio
    of probabilities, 20 unless it is set beside `loss` or later."""
    loss_aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """How token losses become one number. `gspo`, `sapo` and `gmpo` take `seq-mean-token-mean` unless it is set beside
    `loss` or later."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    kl_loss: bool = False
    """Add a KL penalty against the reference policy to the loss."""
    kl_loss_coef: NotNegative = 0.001
    """Weight of the KL penalty in the loss."""
    kl_in_reward: bool = False
    """Subtract a KL penalty from the reward."""
    kl_in_reward_coef: NotNegative = 0.001
    """Weight of the KL penalty in the reward."""
    filter_groups: FilterGroups = FilterGroups()
    """Dynamic sampling."""


class CriticSpec(Part):
    """The value model; trained with `algorithm.advantage: gae` only."""

    path: Text | None = None
    """As `model.path`; null means the policy's own start."""
    lr: Positive = 1e-5
    """Learning rate of the critic."""
    micro_batch_size_per_gpu: Count | None = None
    """Full-length responses a forward pass, whose tokens are then `max_tokens_per_gpu`: verl's critic always batches
    by tokens."""
    max_tokens_per_gpu: Tokens | None = "auto"
    """Tokens a forward pass. `auto` is what the estimated memory allows, unless `micro_batch_size_per_gpu` is given;
    null is verl's own number (32768)."""


class RolloutSpec(Part):
    """How responses are sampled."""

    precision: PrecisionName = "bf16"
    """Arithmetic of the linear layers in the rollout engine (fp8-block is verl's own); the policy is trained in its
    own."""
    kv_cache: Literal["auto", CacheName] = "auto"
    """Arithmetic of the rollout engine's KV cache: `auto` is the model's; `fp8` and `int8` hold about twice as many
    tokens in the same memory, of which `int8`, with a scale for each token and head, is nearer to the trainer."""
    rotation: Literal["auto", "off", 16, 32, 64, 128] = "auto"
    """Block by which int8 rollouts rotate the input of each linear layer before they round it, which spreads outliers:
    `auto` is the largest up to 128 that divides every input on every rank, or off with `rollout.profile`."""
    profile: Text | None = None
    """Smoothing profile (a file of `flashrl quantize --calibrate`) that every refit applies before it quantizes; null
    for none."""
    mix: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the rollout replicas that stay in bf16 while the others take `precision`; rounded up to whole replicas.
    """
    lm_head_fp32: bool = False
    """Compute the logits in float32 in the rollout engine, instead of rounding them to the model's bf16."""
    n: Count = 1
    """Responses to one prompt."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: Fraction = 1.0
    """Nucleus sampling; 1 samples from the whole distribution, as importance sampling (`--tis`) needs it."""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Sample among the k likeliest tokens; -1 for all, as importance sampling (`--tis`) needs it."""
    tensor_parallel: Count = 1
    """GPUs an engine (verl's own default is 2)."""
    gpu_memory_utilization: Fraction = 0.5
    """Share of GPU memory that the engine takes, weights and KV cache together."""
    max_num_seqs: Count = 256
    """Sequences an engine runs at once."""
    max_num_batched_tokens: Count = 8192
    """Tokens an engine processes at once."""
    max_model_len: Count | None = None
    """Longest sequence of the engine; null means prompt + response (verl's own null is the model's whole context)."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Responses a forward pass of the trainer that recomputes log-probs, the reference policy's included; null for
    batches by tokens, or for `algorithm.micro_batch_size_per_gpu`."""
    log_prob_max_tokens_per_gpu: Tokens | None = "auto"
    """Tokens a forward pass of the trainer that recomputes log-probs, the reference policy's included. `auto` is what
    the estimated memory allows; null, as in verl, `algorithm.max_tokens_per_gpu`."""


class RejectSpec(Part):
    """What is left out of the update, because rollout and trainer differ too much on it."""

    by: By
    """`token` judges and rejects single tokens; the others reject a response, by the sum, the mean or the largest of
    its tokens' estimates."""
    estimator: Estimator = "k1"
    """Estimate of a token, with w = p_train / p_rollout: `k1` is w itself (its product over a response for `seq-sum`,
    its geometric mean for `seq-mean`), `k2` is (ln w)² / 2 and `k3` is w - ln w - 1, both in nats."""
    lower: Positive | None = None
    """Least importance weight that is kept (`k1`); null means 1 / `upper`."""
    upper: Positive
    """Largest importance weight that is kept (`k1`), or largest divergence in nats (`k2`, `k3`)."""

    @property
    def text(self) -> str:
        """The rejection in words, as plans print it."""
        below = f"below {self.lower:g} or " if self.lower is not None else ""
        return f"rejection by {self.by} {self.estimator} {below}above {self.upper:g}"


class CorrectionSpec(Part):
    """Correction for sampling with another arithmetic than training, by weights w = p_train / p_rollout."""

    kind: CorrectionKind = "none"
    """`tis`: token weights min(w, cap). `icepop`: token weights w, or 0 outside of `lower` to `cap`. `seq-tis`: the
    product of a response's token weights, at most `cap`, for each of its tokens. A `cap` alone means `tis`."""
    cap: Positive | None = None
    """Largest weight; null means 2, and 5 with `icepop`. Where no `kind` is set, null means `none`."""
    lower: Positive | None = None
    """Least weight of `icepop`; null means 0.5."""
    reject: RejectSpec | None = None
    """Tokens or responses that are left out of the update; null for none."""
    support: Literal["full", "kept"] = "full"
    """Tokens over which the trainer normalizes log-probs: the vocabulary (`full`), or those that `rollout.top_k` and
    `rollout.top_p` keep (`kept`), so that weights have mean 1 at any temperature."""
    keep_responses: Annotated[int, Field(ge=0)] = 256
    """Responses a step whose tokens' log-ratios of trainer and rollout are kept for `flashrl runs correction`, at most
    1 Mi tokens a step and 256 MiB an attempt. 0 for none."""

    @property
    def active(self) -> bool:
        """Whether anything of it compares the log-probs of rollout and trainer."""
        return self.kind != "none" or self.reject is not None

    @property
    def text(self) -> str:
        """The correction in words, as plans print it."""
        cap, lower = f"{self.cap or 0:g}", f"{self.lower or 0:g}"
        weights = {
            "none": "no importance sampling",
            "tis": f"truncated importance sampling at {cap}",
            "icepop": f"IcePop from {lower} to {cap}",
            "seq-tis": f"importance weights of responses, truncated at {cap}",
        }[self.kind]
        over = ", over the tokens that were kept" if self.support == "kept" else ""
        return f"{weights}{over}, {self.reject.text}" if self.reject else f"{weights}{over}"


class Overlong(Part):
    """DAPO's soft punishment: the reward falls over the last `buffer_len` tokens before `data.max_response_length`."""

    buffer_len: Count
    """Tokens over which the penalty grows from 0 to `penalty_factor`."""
    penalty_factor: NotNegative = 1.0
    """Penalty of a response that fills the whole length."""
    log: bool = False
    """Report the penalty among the reward's fields."""


class RewardSpec(Part):
    """How responses are scored: by verl's scorer for the data's `data_source`, or by a function of the user's."""

    function: Text | None = None
    """Reward function, as `FILE.py:NAME` ([Own rewards](rewards.md)); null for verl's scorers."""
    arguments: dict[str, Argument] = {}
    """Further arguments of `function`, by name."""
    sources: Annotated[tuple[Text, ...] | None, Field(strict=False)] = None
    """Values of `data_source` whose rows `function` scores; null for all. verl's scorers take the others."""
    timeout_s: Positive = 60
    """Longest time of a call of `function`, s; the run ends if a call takes longer."""
    threshold: float = 0.5
    """A response counts as right if `function` gives it more than this, unless it returns `acc` itself."""
    manager: Literal["naive", "dapo", "gdpo", "rate_limited", "remote"] = "naive"
    """verl's reward manager."""
    overlong: Overlong | None = None
    """Soft punishment of overlong responses (manager `dapo`); null for none."""


class TrainerSpec(Part):
    """Length of the run, validation, checkpoints and logs."""

    project: FolderName
    """Project name; checkpoints are in `checkpoints/<project>/<run>`."""
    epochs: Count = 30
    """Passes over the training data, unless `steps` ends the run earlier."""
    steps: Count | None = None
    """Training steps; null means as many as `epochs` give."""
    save_every: int = -1
    """Steps between checkpoints, the last step included; -1 for none."""
    validate_every: int = -1
    """Steps between validations, the last step included; -1 for none."""
    validate_before: bool = True
    """Validate the starting policy before the first step. False where `validate_every` is -1, unless this is set
    beside it or later: by the same preset, by one that extends it, or by an option."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Steps in which only the critic learns."""
    mode: Literal["sync", "colocate_async", "separate_async"] = "sync"
    """`sync` samples a batch, then trains on it. `colocate_async` samples ahead on the same GPUs and interrupts what is
    unfinished while it trains. `separate_async` samples on GPUs of its own while the others train."""
    prefetch: NotNegative = 1
    """Batches that an asynchronous mode samples ahead, a fraction rounded down to whole prompts. 0 samples each batch
    when it is needed."""
    max_staleness: Count = 8
    """Steps for which a response to a prompt may be used in asynchronous modes, counted from the step that submitted
    the prompt, which is the first; more than `prefetch` rounded up."""
    stale: Literal["drop", "wait"] = "drop"
    """What happens to groups of responses over `max_staleness`: they are dropped and other prompts sampled, or no step
    begins while one that reaches it is unfinished."""
    keep_samples: Annotated[int, Field(ge=0)] = 8
    """Responses a step that are kept as text for `flashrl runs samples`, at most 64 MiB an attempt. 0 for none."""
    logger: Annotated[tuple[Text, ...], Field(strict=False)] = ("console", "file")
    """verl's loggers (verl's own default is console and wandb); flashrl reads `file`."""


class ResourceSpec(Part):
    """What the run needs."""

    platform: Literal["cuda", "cpu"] = "cuda"
    """`cpu` runs the same stack on a machine without a GPU; extend `base/cpu` for the rest that takes."""
    nodes: Count = 1
    """Machines."""
    gpus_per_node: Count = 1
    """GPUs on each (verl's own default is 8); on `cpu` the number of trainer processes."""
    rollout_nodes: Count | None = None
    """Machines with GPUs for rollout engines alone (`trainer.mode: separate_async`); null means as many as `nodes`."""
    rollout_gpus_per_node: Count | None = None
    """GPUs for rollout engines alone on each of them, beside those of `gpus_per_node` where a machine has both; null
    means as many as `gpus_per_node`."""
    gpu_memory_gib: Positive | None = None
    """Memory of each GPU, GiB, for the estimate of what fits; null means what the driver reports, or 80 GB where
    there is none."""

    @property
    def devices(self) -> int:
        """Trainer processes of the run, one a GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def separate_devices(self) -> int:
        """GPUs for rollout engines alone; 0 where the engines share the trainer's."""
        return (self.rollout_nodes or 0) * (self.rollout_gpus_per_node or 0)

    @property
    def rollout_devices(self) -> int:
        """GPUs with rollout engines."""
        return self.separate_devices or self.devices

    @property
    def all_devices(self) -> int:
        """GPUs of the run."""
        return self.devices + self.separate_devices


class WatchSpec(Part):
    """When flashrl ends a run: clocks in seconds, and bounds beyond which rollouts do not sample from the policy."""

    start_timeout_s: Positive | None = None
    """Longest time of any phase of the start; null means a clock for each phase, from 10 to 30 minutes."""
    step_timeout_s: Positive = 7200
    """Longest time of a step, the first one's sampling included."""
    failure_grace_s: Positive = 30
    """Time that verl gets to end by itself once its log shows that a worker died."""
    stop_grace_s: Positive = 60
    """Time that verl gets to end when it is asked to (Ctrl-C)."""
    max_kl: Positive = 0.5
    """Bound of |KL| between rollout and trainer, nats a token."""
    max_weight_deviation: Positive = 0.5
    """Bound of |mean importance weight - 1|, before the start also of weights of responses (`seq-tis`)."""
    max_rejected: Fraction = 0.9
    """Largest share of a step's tokens that `correction.reject` may leave out."""
    min_correlation: Fraction = 0.9
    """Least correlation of the sampled tokens' probabilities, where they differ by more than `max_prob_difference`."""
    max_prob_difference: Positive = 0.05
    """Mean difference of probabilities below which the correlation is not judged."""


class RunSpec(Part):
    """One training run."""

    name: FolderName
    """The preset's name, from which runs are named; the file's name unless it is set."""
    description: str = ""
    """The preset in one line."""
    model: ModelSpec
    data: DataSpec
    algorithm: AlgorithmSpec
    critic: CriticSpec = CriticSpec()
    rollout: RolloutSpec = RolloutSpec()
    correction: CorrectionSpec = CorrectionSpec()
    reward: RewardSpec = RewardSpec()
    trainer: TrainerSpec
    resources: ResourceSpec = ResourceSpec()
    watch: WatchSpec = WatchSpec()
    env: dict[str, Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]] = {}
    """Environment variables of the run."""
    verl: dict[str, VerlValue] = {}
    """Further keys of verl's, dotted and word for word; `+key` for one that verl's own tree lacks."""
