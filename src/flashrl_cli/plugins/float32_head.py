"""Logits in float32: what `rollout.lm_head_fp32` asks for.

vLLM computes them in the model's dtype and converts them afterwards (vllm/v1/sample/sampler.py:97), so that bf16 leaves 8 bits of each
logit. vLLM's own `head_dtype` does this for generation from 0.28 on; in 0.24 it is for pooling models only (vllm/config/model.py:1671).
The logits processor is replaced through vLLM's hook for layers from outside (vllm/model_executor/custom_op.py, `register_oot`), so that
the head and its weights stay what they are: tied or not, packed or not, refitted in place or layer by layer.
"""

from __future__ import annotations

import torch
import vllm
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from flashrl_cli import contract

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Float32LogitsProcessor(LogitsProcessor):
    """vLLM's logits processor, multiplying into float32. Scale and soft cap come after it, in float32, too."""

    def _get_logits(
        self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """As the base's (logits_processor.py:86 in 0.24, :182 in 0.28): gathered over ranks, without the vocabulary's padding."""
        logits: torch.Tensor | None = float32_logits(lm_head, hidden_states, embedding_bias)
        if lm_head.tp_size > 1:
            logits = self._gather_logits(logits)
        return None if logits is None else logits[..., : self.org_vocab_size]


def float32_logits(
    head: VocabParallelEmbedding, hidden: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states [..., H] times the head's weight [V, H]: float32 logits [..., V].

    A product of two bf16 numbers is exact in float32, so that the GPU's kernel for bf16 computes in float32 already and only its output
    was rounded: it reads the bf16 weights, where a float32 copy of them takes 2 GiB at 7B. Elsewhere both are converted at each step.
    """
    if not isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        raise TypeError(f"logits in float32 need floating weights, and the lm_head has {type(head.quant_method)}")
    if hidden.is_cuda and hidden.dtype == head.weight.dtype != torch.float32:
        # for bf16 and fp16 only (torch 2.8 and newer); vLLM 0.24 has it in fused_moe/router/gate_linear.py:142
        logits = torch.mm(hidden.reshape(-1, hidden.shape[-1]), head.weight.t(), out_dtype=torch.float32)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        return logits if bias is None else logits + bias.float()
    return torch.nn.functional.linear(hidden.float(), head.weight.float(), None if bias is None else bias.float())


def register() -> None:
    """Have every model that is built from now on compute its logits in float32 (idempotent)."""
    contract.require_vllm(vllm.__version__)
    if LogitsProcessor.__name__ not in op_registry_oot:
        LogitsProcessor.register_oot(Float32LogitsProcessor)


def head_dtype(model: torch.nn.Module) -> str:
    """The dtype in which a model computes logits, `fp32` for one whose every logits processor does."""
    processors = [layer for layer in model.modules() if isinstance(layer, LogitsProcessor)]
    embeddings = (layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding))
    weights = next((layer.weight.dtype for layer in embeddings), torch.get_default_dtype())
    if processors and all(_is_float32(processor) for processor in processors):
        return NAMES[torch.float32]
    return NAMES.get(weights, str(weights))


def _is_float32(processor: LogitsProcessor) -> bool:
    """Ours, or one that `hf_overrides` told so (0.25 and newer may have the attribute)."""
    return isinstance(processor, Float32LogitsProcessor) or getattr(processor, "head_dtype", None) == torch.float32
