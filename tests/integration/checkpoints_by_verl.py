"""Run as a script: a small run's checkpoints as verl writes them, and the weights that verl's own merger makes of them.

`make OUT MODEL STEP…`, in each rank's process (RANK, WORLD_SIZE, MASTER_PORT in the environment), writes OUT/model, a
copy of the policy MODEL (whose odd vocabulary shards unevenly), and OUT/run/global_step_N with weights of their own;
with more than one rank also OUT/fsdp1, OUT/lora and OUT/peft. `merge TARGET ACTOR…` is verl's model merger.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any


def trained(folder: Path, step: int) -> Any:
    """The model of `folder` with weights that only this step has, in float32; the further, the less it knows."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.02 * step)
    return model


def with_lora(model: Any) -> Any:
    """`model` with a trained adapter on every linear layer, as verl adds it."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return adapted


def sharded(model: Any, mesh: Any) -> Any:
    """The model as verl shards it with FSDP2: each layer, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_by_fsdp1(model: Any, mesh: Any) -> Any:
    """The model as verl shards it with FSDP1."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_mesh=mesh, device_id=torch.device("cpu"))


def save(model: Any, step_folder: Path, *, lora_only: bool = False) -> None:
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    contents = {"save_contents": ["model"], "load_contents": ["model"], "save_lora_only": lora_only}
    FSDPCheckpointManager(
        model=model,
        optimizer=None,
        lr_scheduler=None,
        processing_class=AutoTokenizer.from_pretrained(step_folder.parents[1] / "model"),
        checkpoint_config=OmegaConf.create(contents),
    ).save_checkpoint(str(step_folder / "actor"), global_step=int(step_folder.name.rpartition("_")[2]))


def make(out: Path, policy: Path, steps: list[int]) -> None:
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh

    if os.environ["RANK"] == "0":
        shutil.copytree(policy, out / "model")
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    world_size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    for step in steps:
        save(sharded(trained(out / "model", step), mesh), out / "run" / f"global_step_{step}")
    (out / "run" / "latest_checkpointed_iteration.txt").write_text(str(max(steps)))
    if world_size > 1:
        save(sharded_by_fsdp1(trained(out / "model", 1), mesh), out / "fsdp1" / "global_step_1")
        make_lora(out, mesh)
    torch.distributed.destroy_process_group()


def make_lora(out: Path, mesh: Any) -> None:
    """The steps of a run of adapters, one saved with its base and one without, and the adapter as PEFT saves it."""
    import torch
    from transformers import AutoModelForCausalLM

    for step, lora_only in ((1, False), (2, True)):
        model = with_lora(AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32))
        if os.environ["RANK"] == "0":
            model.save_pretrained(out / "peft")
        save(sharded(model, mesh), out / "lora" / f"global_step_{step}", lora_only=lora_only)


def merge(actors: list[Path], target: Path) -> None:
    """What verl's merger makes of each `actor` folder, in folders of `target` numbered from 0."""
    from verl.model_merger.__main__ import main

    for number, actor in enumerate(actors):
        ends = ["--local_dir", str(actor), "--target_dir", str(target / str(number))]
        sys.argv = ["model_merger", "merge", "--backend", "fsdp", *ends]
        main()


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]), [int(step) for step in sys.argv[4:]])
    else:
        merge([Path(actor) for actor in sys.argv[3:]], Path(sys.argv[2]))
