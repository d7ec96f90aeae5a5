"""Run as a script: a small run's checkpoints as verl writes them, and the weights that verl's own merger makes of them.

`make OUT STEP…`, in each rank's process (RANK, WORLD_SIZE, MASTER_PORT in the environment), writes OUT/model, a tiny
Qwen2 whose odd vocabulary shards unevenly, and OUT/run/global_step_N with weights of their own. `merge ACTOR TARGET` is
verl's model merger.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(symbols),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def trained(folder: Path, step: int, mesh: Any) -> Any:
    """The model of `folder` with weights that only this step has, in float32, sharded as verl shards it."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make(out: Path, steps: list[int]) -> None:
    import torch.distributed
    from omegaconf import OmegaConf
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    if os.environ["RANK"] == "0":
        make_model(out / "model")
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("fsdp",))
    for step in steps:
        FSDPCheckpointManager(
            model=trained(out / "model", step, mesh),
            optimizer=None,
            lr_scheduler=None,
            processing_class=AutoTokenizer.from_pretrained(out / "model"),
            checkpoint_config=OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]}),
        ).save_checkpoint(str(out / "run" / f"global_step_{step}" / "actor"), global_step=step)
    (out / "run" / "latest_checkpointed_iteration.txt").write_text(str(max(steps)))
    torch.distributed.destroy_process_group()


def merge(actor: str, target: str) -> None:
    from verl.model_merger.__main__ import main

    sys.argv = ["model_merger", "merge", "--backend", "fsdp", "--local_dir", actor, "--target_dir", target]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), [int(step) for step in sys.argv[3:]])
    else:
        merge(*sys.argv[2:])
