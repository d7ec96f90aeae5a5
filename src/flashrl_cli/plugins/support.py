"""Log-probs over the tokens that top-k and top-p kept, in rollout and trainer alike.

A rollout that truncates samples y from p'(y) / Z' for y in the kept set K, where p' are its probabilities after the
temperature and Z' is their sum over K. verl's trainer gives log p(y) over the whole vocabulary, so that an importance
weight of stock verl has the mean Z, the trainer's mass of K, and not 1. With

    log p_K(y) = z_y - log sum_{j in K} exp z_j

in the trainer, w = p_K(y) / (p'(y) / Z') has mean 1 at any temperature, and the policy gradient is exactly that of the
truncated policy. K must be the rollout's: tokens at the edge of what the trainer itself would keep may have been
excluded there, so that no response could have them, and others may occur that the trainer would exclude.

vLLM's `return_sampling_mask` (https://github.com/vllm-project/vllm/pull/49577) returns K, but vLLM 0.24 lacks it, and
verl reads it in no version. Here the engine is asked for the log-probs of the most probable tokens, which every version
has: under `processed_logprobs` those outside of K are -inf. K is bounded by top-k, as `return_sampling_mask` demands,
too. The ids go to the trainer as verl's `teacher_ids`, its field for token ids at each position
(verl/experimental/agent_loop/agent_loop.py:153 in 0.9.1), which distillation uses and nothing else.

verl imports this module through its hook `actor_rollout_ref.model.external_lib` in the rollout server, in the workers
of agent loops and in the trainer, and does not start without it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from flashrl_cli import contract
from flashrl_cli.contract import PATCHED, VERL
from flashrl_cli.plugins.log_probs import wide
from flashrl_cli.plugins.outputs import SERVER

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRAINER = "verl.workers.engine.fsdp.transformer_impl"
"""verl's module with the training engine (class FSDPEngineWithLMHead)."""
CLIENT = "verl.workers.rollout.llm_server"
"""verl's module with the rollout's clients (class FullyAsyncLLMServerClient)."""
FIELD = "teacher_ids"
"""verl's field for token ids at each position of a response, int32 [tokens, columns]; -1 after the last one."""
EXCLUDED = -30.0
"""Log-prob of a sampled token outside of the columns, without a gradient: its weight is exp(-20), verl's least.

Only more than `contract.kept_columns` tokens with equal logits leave a kept token out. The columns do not depend on
which token was sampled, so that the policy is truncated to them and the mean weight remains 1.
"""


def apply() -> None:
    """Change server, client and trainer where this process has imported them, as each has when it reads the model.

    Raises RuntimeError for another verl or vLLM.
    """
    if importlib.metadata.version("verl") != VERL:
        raise RuntimeError(f"flashrl carries the kept tokens with verl {VERL} only")
    if SERVER in sys.modules:
        ask_for_kept_tokens()
    if CLIENT in sys.modules:
        join_kept_tokens()
    if TRAINER in sys.modules:
        normalize_over_kept_tokens()


class Sampled(NamedTuple):
    """A sampled token's log-prob, as verl reads it."""

    logprob: float


class KeptTokens:
    """The log-probs of a response's tokens, and the tokens that were kept at each position.

    Takes the place of vLLM's list of dictionaries, which would have an object for each kept token. Iterating gives, for
    each position, the log-prob of the sampled token by its id.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._ids: list[NDArray[np.int32]] = []
        self._log_probs: list[NDArray[np.float32]] = []

    def add(self, ids: NDArray[np.int32], log_probs: NDArray[np.float32]) -> None:
        """Add positions: ids and log-probs [positions, at least 1 + columns], the sampled token first."""
        self._ids.append(ids[:, : 1 + self._columns])
        self._log_probs.append(log_probs[:, : 1 + self._columns])

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    def __iter__(self) -> Iterator[dict[int, Sampled]]:
        for ids, log_probs in zip(self._ids, self._log_probs, strict=True):
            for token, value in zip(ids[:, 0].tolist(), log_probs[:, 0].tolist(), strict=True):
                yield {token: Sampled(value)}

    def ids(self) -> torch.Tensor:
        """The kept tokens of each position, int32 [positions, columns]; -1 in the columns of excluded ones."""
        ids, log_probs = (np.concatenate(parts)[:, 1:] for parts in (self._ids, self._log_probs))
        return torch.from_numpy(np.where(np.isfinite(log_probs), ids, -1).astype(np.int32))


def ask_for_kept_tokens() -> None:
    """Let verl's server ask vLLM for the kept tokens of each request with a top-k, and pass them on.

    `generate` (vllm_async_server.py:558) asks for no log-probs but the sampled token's, and gives
    `extract_prompt_logprobs` the finished request and the fields that go along with the response. Raises RuntimeError
    for a version of vLLM that is not supported.
    """
    import vllm
    from vllm.v1.engine.logprobs import LogprobsProcessor

    contract.require_vllm(vllm.__version__)
    server: Any = sys.modules[SERVER]
    request, extract = server.SamplingParams, server.extract_prompt_logprobs
    update = LogprobsProcessor._update_sample_logprobs

    @functools.wraps(request)
    def sampling_params(**settings: Any) -> Any:
        top_k = settings.get("top_k", 0)
        if settings.get("logprobs") == 0 and 1 < top_k <= contract.MOST_KEPT:
            settings["logprobs"] = contract.kept_columns(top_k)
        return request(**settings)

    @functools.wraps(update)
    def update_sample_logprobs(self: Any, lists: Any) -> None:
        if not self.num_logprobs:
            update(self, lists)
            return
        if not isinstance(self.logprobs, KeptTokens):
            self.logprobs = KeptTokens(self.num_logprobs)
        ids, log_probs = lists[:2]
        self.logprobs.add(ids, log_probs)
        self.cumulative_logprob += float(log_probs[:, 0].sum())

    @functools.wraps(extract)
    def extract_prompt_logprobs(output: Any, num_prompt_logprobs: int | None, result_dict: dict[str, Any]) -> None:
        extract(output, num_prompt_logprobs, result_dict)
        found = output.outputs[0].logprobs
        if isinstance(found, KeptTokens) and len(found):
            result_dict[FIELD] = found.ids()

    server.SamplingParams, server.extract_prompt_logprobs = sampling_params, extract_prompt_logprobs
    LogprobsProcessor._update_sample_logprobs = update_sample_logprobs


def join_kept_tokens() -> None:
    """Let verl's client join the kept tokens of the parts of a response that weight updates interrupted (idempotent).

    In its asynchronous modes verl goes on with such a response by another request, and joins the tokens and log-probs
    of all of them, but none of their other fields (verl/workers/rollout/llm_server.py:276 and :303).
    """
    client: Any = sys.modules[CLIENT]
    request, response = client.LLMServerClient.generate, client.FullyAsyncLLMServerClient.generate
    if getattr(request, PATCHED, False):
        return
    parts: ContextVar[list[torch.Tensor] | None] = ContextVar("parts", default=None)

    @functools.wraps(request)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = await request(self, *args, **kwargs)
        known = parts.get()
        if known is not None and FIELD in output.extra_fields:
            known.append(output.extra_fields[FIELD])
        return output

    @functools.wraps(response)
    async def generate_resumed(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = parts.set([])
        try:
            output = await response(self, *args, **kwargs)
            if known := parts.get():
                output.extra_fields[FIELD] = torch.cat(known)
        finally:
            parts.reset(token)
        return output

    setattr(generate, PATCHED, True)
    client.LLMServerClient.generate = generate
    client.FullyAsyncLLMServerClient.generate = generate_resumed


def normalize_over_kept_tokens() -> None:
    """Let verl's engine normalize the log-probs of responses over the kept tokens of each position.

    This holds for every use of log-probs: the old policy's, the new one's and the reference policy's. Entropies are
    those of the whole vocabulary. `prepare_model_outputs` (transformer_impl.py:1338) computes log-probs by the function
    of its module that is replaced here while it runs. It raises RuntimeError for a batch without kept tokens and for
    fused kernels.
    """
    from verl.utils.ulysses import get_ulysses_sequence_parallel_rank

    trainer: Any = sys.modules[TRAINER]
    engine = trainer.FSDPEngineWithLMHead
    original = engine.prepare_model_outputs

    @functools.wraps(original)
    def prepare_model_outputs(
        self: Any, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> Any:
        if FIELD not in micro_batch:
            raise RuntimeError("the rollout returned no kept tokens, over which log-probs are to be normalized")
        if getattr(output, "logits", None) is None:
            raise RuntimeError("fused kernels compute log-probs over all tokens, and the kept ones were asked for")
        rank = get_ulysses_sequence_parallel_rank() if self.use_ulysses_sp else 0
        kept = in_rows(micro_batch[FIELD], micro_batch["input_ids"])
        kept = own_rows(kept, len(output_args["input_ids_rmpad_rolled"]), rank)
        everywhere = trainer.logprobs_from_logits
        trainer.logprobs_from_logits = functools.partial(log_probs, kept=kept)
        try:
            return original(self, output, output_args, micro_batch, logits_processor_func)
        finally:
            trainer.logprobs_from_logits = everywhere

    engine.prepare_model_outputs = prepare_model_outputs


def in_rows(kept: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """The kept tokens [rows, columns] of the token after each one of packed sequences; -1 where that is a prompt's.

    `kept` is jagged [sequences, tokens of the response, columns] and `sequences` jagged [sequences, tokens].
    """
    values, offsets = kept.values(), kept.offsets()
    lengths, begins, ends = offsets.diff(), sequences.offsets()[:-1], sequences.offsets()[1:]
    # the token before the first one of a response is where that is predicted
    shift = ends - lengths - 1 - offsets[:-1]
    by_row = torch.stack([shift, begins]).repeat_interleave(lengths, 1, output_size=len(values))
    # verl's synthetic sequences have as many rows as tokens (trainer/ppo/padding_utils.py:108), and no loss counts them
    rows = torch.maximum(torch.arange(len(values), device=values.device) + by_row[0], by_row[1])
    found = values.new_full((len(sequences.values()), values.shape[1]), -1)
    found[rows] = values
    return found


def own_rows(kept: torch.Tensor, rows: int, rank: int) -> torch.Tensor:
    """The part [rows, columns] of rank `rank` in sequence parallelism, or with padding; -1 in padded rows."""
    part = kept[rank * rows : (rank + 1) * rows]
    return torch.nn.functional.pad(part, (0, 0, 0, rows - len(part)), value=-1)


def log_probs(
    logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True, *, kept: torch.Tensor
) -> torch.Tensor:
    """Log-probs of labels [rows] among the kept tokens [rows, columns], whose columns of -1 are none, in float32.

    Logits are [rows, vocabulary], after the temperature. Rows without kept tokens, which are those of prompts, have the
    log-prob 0, and labels that were not kept EXCLUDED; neither has a gradient. `inplace_backward` is verl's, and has no
    effect: the gradient is 0 but for the kept tokens. Raises ValueError for kept tokens of another number of rows.
    """
    if len(kept) != len(logits):
        raise ValueError(f"{len(kept)} rows of kept tokens do not fit {len(logits)} rows of logits")
    columns = torch.cat([labels[:, None], kept.clamp(min=0)], -1).long()
    chosen = logits.gather(-1, columns).to(wide(logits))
    is_kept = kept >= 0
    none = ~is_kept.any(-1)
    # in a row without kept tokens the logarithm of 0 would make a gradient of nan, which no mask removes
    total = chosen[:, 1:].masked_fill(~(is_kept | none[:, None]), -torch.inf).logsumexp(-1)
    found = torch.where((kept == labels[:, None]).any(-1), chosen[:, 0] - total, EXCLUDED)
    return found.masked_fill(none, 0.0)


if contract.plugin_dir() is not None:
    apply()
