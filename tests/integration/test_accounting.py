"""Checkpoints with one thing wrong, refused by every command that reads weights; good ones, copied as they are."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli.bench import request as bench
from flashrl_cli.errors import FlashrlError, InputError, RunFailed
from flashrl_cli.quantize.inputs import plan
from flashrl_cli.quantize.offline import quantize
from flashrl_cli.runs import merge
from flashrl_cli.runs.checkpoints import Checkpoint, find
from flashrl_cli.weights import Unreadable, Weights, expected, read_json

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

Tensors = dict[str, "torch.Tensor"]
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
}  # fmt: skip
DOWN, NORM, EMBEDDING, HEAD = (
    "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is kept of architectures is this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config(folder: Path, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **SIZES, **more}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder: Path, dtype: str = "bfloat16") -> Tensors:
    """Random tensors of all names and shapes that the folder's config asks for."""
    import torch

    wanted = expected(folder)
    assert wanted
    torch.manual_seed(0)
    shapes = wanted.forms[-1]
    return {name: torch.randn(shape).to(getattr(torch, dtype)) for name, shape in shapes.items()}


def written(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> Path:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name, {"format": "pt"})
    return folder


def lacks_a_layer(found: Tensors) -> None:
    del found[DOWN]


def lacks_its_head(found: Tensors) -> None:
    del found[HEAD]


def has_a_prefix(found: Tensors) -> None:
    for name in list(found):
        found[f"_orig_mod.{name}"] = found.pop(name)


def is_empty(found: Tensors) -> None:
    for name in found:
        found[name] = found[name].new_zeros(0)


def has_another_shape(found: Tensors) -> None:
    found[NORM] = found[NORM][:-1]


def is_of_integers(found: Tensors) -> None:
    found[DOWN] = found[DOWN].short()


def has_no_number(found: Tensors) -> None:
    found[NORM][3] = math.nan
    found[EMBEDDING][0, 0] = math.inf
    found["model.layers.0.self_attn.k_proj.bias"][1] = -math.inf


WRONG: dict[Callable[[Tensors], None], str] = {
    lacks_a_layer: f"missing 1 tensor: {DOWN}",
    lacks_its_head: f"missing 1 tensor: {HEAD}",
    has_a_prefix: "all tensors are named _orig_mod.…",
    is_empty: "27 tensors are empty, as DeepSpeed's ZeRO-3 leaves",
    has_another_shape: f"{NORM} (in model.safetensors) [31], not [32]",
    is_of_integers: f"1 tensor in I16 and not in floating point: {DOWN}",
    has_no_number: f"model.layers.0.self_attn.k_proj.bias (in model.safetensors), {NORM} (in model.safetensors)",
}


def merged(folder: Path) -> None:
    merge.merged(find([str(folder)]).checkpoints, folder.parent / "merged", lambda _: None)


def quantized(folder: Path) -> None:
    quantize(plan(str(folder), folder.parent / "quantized", "int8", [], None), str)


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_wrong_checkpoint_is_refused_by_every_command(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    """Before an engine takes a tensor of it and without a byte written; values alone are seen while they are read."""
    folder = config(tmp_path / "m")
    found = tensors_of(folder)
    change(found)
    written(folder, found)
    for command in (merged, quantized):
        with pytest.raises(FlashrlError) as caught:
            command(folder)
        assert WRONG[change] in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    stream = Weights(hf=folder).tensors()
    with pytest.raises(Unreadable) as refused:
        list(stream) if change is has_no_number else next(stream)
    assert WRONG[change] in str(refused.value)
    if change is not has_no_number:
        with pytest.raises(InputError) as unmeasured:
            bench.find(str(folder))
        assert WRONG[change] in str(unmeasured.value)


def test_an_engine_takes_nothing_of_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds no policy after values that are no numbers were met on the way into it."""
    pytest.importorskip("vllm")
    from flashrl_cli.plugins.disk_refit import DiskRefitExtension

    taken: list[str] = []

    class Worker(DiskRefitExtension):
        def _renew(self, stream: Any, *, reused: bool = False, watched: bool | None = None) -> float:
            stream(lambda bucket: taken.extend(name for name, _ in bucket))
            return 0.0

    folder = config(tmp_path / "m")
    whole = tensors_of(folder)
    for change, spoilt in ((lacks_a_layer, False), (has_no_number, True)):
        found = {name: tensor.clone() for name, tensor in whole.items()}
        change(found)
        written(folder, found)
        told = Worker().load_from_disk(Weights(hf=folder).plain())
        assert WRONG[change] in told["unreadable"]
        assert told["spoilt"] is spoilt
        assert taken == []


def test_one_that_is_refused_does_not_stop_the_others(tmp_path: Path) -> None:
    one, two = (config(tmp_path / name) for name in ("one", "two"))
    found = tensors_of(one)
    written(two, found)
    written(one, {name: tensor for name, tensor in found.items() if name != DOWN})
    with pytest.raises(RunFailed, match=f"one cannot be merged: missing 1 tensor: {DOWN}") as caught:
        merge.merged(find([str(one), str(two)]).checkpoints, tmp_path / "out", lambda _: None)
    assert caught.value.hint == f"the other 1 are written to {tmp_path / 'out'}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two"]


def test_shards_that_lost_a_layer(tmp_path: Path) -> None:
    """On all ranks, or on one; and shards in which a value is no number."""
    import torch

    hf = config(tmp_path / "huggingface")
    found = tensors_of(hf)
    files = tuple(tmp_path / f"{rank}.pt" for rank in range(2))
    for file in files:
        torch.save({name: tensor for name, tensor in found.items() if name != DOWN}, file)
    weights = Weights(hf=hf, shards=files)
    with pytest.raises(Unreadable, match=f"missing 1 tensor: {DOWN}"):
        next(weights.tensors())
    torch.save(found, files[0])
    with pytest.raises(Unreadable, match=rf"the same parameters: {DOWN} is in 0\.pt and not in all of them"):
        next(weights.tensors())
    found[NORM][0] = math.nan
    for file in files:
        torch.save(found, file)
    with pytest.raises(Unreadable, match=rf"1 tensor with NaN or infinite values: {NORM} \(in {tmp_path.name}\)"):
        list(weights.tensors())


@pytest.mark.parametrize("tied", ["same", "differs", "of another dtype"])
def test_a_head_that_the_config_ties(tied: str, tmp_path: Path) -> None:
    """Left out if it is the embedding, whatever its dtype, else refused: in a folder, and in shards that hold it."""
    import torch

    folder = config(tmp_path / "m", tie_word_embeddings=True)
    found = {name: tensor for name, tensor in tensors_of(folder).items() if name != HEAD}
    found[HEAD] = found[EMBEDDING].clone()
    if tied == "differs":
        found[HEAD][5, 5] += 1
    if tied == "of another dtype":
        found[HEAD] = found[HEAD].float()
    written(folder, found)
    torch.save(found, tmp_path / "shard.pt")
    sharded = Weights(hf=folder, shards=(tmp_path / "shard.pt",))
    if tied == "differs":
        for weights in (Weights(hf=folder), sharded):
            with pytest.raises(Unreadable, match=f"{HEAD} differs from {EMBEDDING}, and config.json ties them"):
                next(weights.tensors())
        with pytest.raises(InputError, match="set that to false"):
            quantized(folder)
        config(folder, tie_word_embeddings=False)
    assert (HEAD in dict(sharded.tensors())) is (tied == "differs")
    quantized(folder)
    assert (HEAD in dict(Weights(hf=tmp_path / "quantized").source())) is (tied == "differs")


MIXED = object()


@pytest.mark.parametrize(
    ("stored", "named", "after"),
    [
        ("float16", {"dtype": "float16"}, {"dtype": "float16"}),
        ("float16", {"torch_dtype": "float16"}, {"torch_dtype": "float16"}),
        ("float16", {}, {}),
        ("float32", {"dtype": "float32"}, {"dtype": "float32"}),
        ("float32", {"torch_dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ("bfloat16", {"torch_dtype": "float32"}, {"dtype": "bfloat16"}),
        ("float16", {"dtype": "float32"}, {"dtype": "float16"}),
        (MIXED, {"dtype": "float32"}, {"dtype": "float32"}),
        (MIXED, {"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        (MIXED, {}, {}),
    ],
)
def test_a_copy_of_a_folder_reads_as_the_folder_does(
    stored: Any, named: dict[str, str], after: dict[str, str], tmp_path: Path
) -> None:
    """Tensors bit by bit, and the dtype that its config named; a trainer's float32 over 16 bits alone is not kept."""
    import torch
    from safetensors.torch import load_file

    folder = config(tmp_path / "m", **named)
    found = tensors_of(folder, "bfloat16" if stored is MIXED else stored)
    if stored is MIXED:
        found[NORM] = found[NORM].float()
    written(folder, found)
    merged(folder)
    copy = load_file(tmp_path / "merged" / "model.safetensors")
    assert copy.keys() == found.keys()
    assert all(torch.equal(copy[name], found[name]) and copy[name].dtype == found[name].dtype for name in found)
    told = read_json(tmp_path / "merged" / "config.json")
    assert {key: told[key] for key in ("dtype", "torch_dtype") if key in told} == after


def test_a_merge_holds_one_set_of_weights(tmp_path: Path) -> None:
    """Files that the index does not list stay and are named: of an earlier save, in Mistral's or PyTorch's form."""
    folder = config(tmp_path / "m")
    found = tensors_of(folder)
    names = sorted(found)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, file in enumerate(files):
        written(folder, {name: found[name] for name in names[number::2]}, file)
    index = {"weight_map": {name: files[number % 2] for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    written(folder, {name: tensor * 0 for name, tensor in found.items()})
    written(folder, {"layers.0.attention.wq.weight": found[NORM]}, "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    said: list[str] = []
    (made,) = merge.merged(find([str(folder)]).checkpoints, tmp_path / "merged", lambda _: None, said.append)
    assert sorted(path.name for path in made.iterdir()) == sorted(
        ["config.json", "tokenizer.json", "model.safetensors.index.json", *files]
    )
    assert said == [f"not copied from {folder}: consolidated.safetensors, model.safetensors, pytorch_model.bin"]
    request = plan(str(folder), tmp_path / "q", "int8", [], None)
    assert next(iter(request.warnings())) == said[0]


def test_adapters_that_change_nothing_or_hold_no_numbers(tmp_path: Path) -> None:
    """No alpha or none that is a number, no rank, no matrices, none that fits a layer, NaN in either matrix."""
    import torch
    from safetensors.torch import save_file

    base, adapter = config(tmp_path / "base"), tmp_path / "adapter"
    written(base, tensors_of(base))
    adapter.mkdir()
    good = {"r": 2, "lora_alpha": 4, "bias": "none", "peft_type": "LORA"}
    pair = {"lora_A": torch.ones(2, 64), "lora_B": torch.ones(32, 2)}

    def read(
        matrices: dict[str, torch.Tensor], module: str = DOWN.removesuffix(".weight"), **settings: object
    ) -> Tensors:
        named = {f"base_model.model.{module}.{name}.weight": one for name, one in matrices.items()}
        save_file(named, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps(good | settings))
        return dict(Weights(hf=base, adapter=adapter, base=base).tensors())

    assert not torch.equal(read(pair)[DOWN], tensors_of(base)[DOWN])
    for settings, why in (
        ({"lora_alpha": 0}, "has lora_alpha 0: the adapter changes nothing"),
        ({"lora_alpha": None}, "names no rank and alpha: r is 2, lora_alpha None"),
        ({"lora_alpha": math.nan}, "names no rank and alpha"),
        ({"r": 0}, "names no rank and alpha: r is 0"),
        ({"r": -2}, "names no rank and alpha: r is -2"),
        ({"rank_pattern": {"q_proj": 8}}, "cannot be merged: rank_pattern"),
    ):
        with pytest.raises(Unreadable, match=why):
            read(pair, **settings)
    with pytest.raises(Unreadable, match="holds no matrices of an adapter"):
        read({})
    with pytest.raises(Unreadable, match=r"holds no pair of matrices for a weight that is there: model\.layers\.9"):
        read(pair, "model.layers.9.mlp.down_proj")
    for name in pair:
        broken = {key: matrix.clone() for key, matrix in pair.items()}
        broken[name][0, 0] = math.nan
        with pytest.raises(Unreadable, match=f"{name} of {DOWN} holds NaN or infinite values"):
            read(broken)


MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip


def test_architectures_and_the_forms_of_their_experts(tmp_path: Path) -> None:
    """One by one as they are published, or fused as Transformers holds them and a trainer's shards do; one that lacks
    is named.
    """
    folder = config(tmp_path / "m", **MOE)
    wanted = expected(folder)
    assert wanted
    fused, apart = wanted.forms
    for shapes in (fused, apart):
        import torch

        found = {name: torch.ones(shape) for name, shape in shapes.items()}
        written(folder, found)
        assert Weights(hf=folder).accounted().keys() == found.keys()
    del found["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(Unreadable, match=r"missing 1 tensor: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        Weights(hf=written(folder, found)).accounted()


def test_an_architecture_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all folders with its sizes, and kept for later processes; what is unknown or cannot be built is compared with
    nothing.
    """
    from flashrl_cli.weights import accounting

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    accounting._of_config.cache_clear()
    first = expected(config(tmp_path / "m", dtype="float32"))
    monkeypatch.setattr(accounting, "_built", lambda config: pytest.fail("built again"))
    assert expected(config(tmp_path / "again", torch_dtype="bfloat16", transformers_version="4.1")) is first
    accounting._of_config.cache_clear()
    assert expected(tmp_path / "m") == first
    monkeypatch.undo()
    for unknown in ({"model_type": "of_nobody"}, {"architectures": ["Qwen2ForNothing"]}, {"num_attention_heads": "x"}):
        assert expected(config(tmp_path / "unknown", **unknown)) is None
    accounting._of_config.cache_clear()


def test_a_step_is_merged_from_folders_that_nobody_may_write(tmp_path: Path) -> None:
    folder = config(tmp_path / "m")
    written(folder, tensors_of(folder))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    made = Checkpoint(source=folder, step=None, hf=folder, run="m")
    (out,) = merge.merged([made], tmp_path / "out", lambda _: None)
    folder.chmod(0o755)
    shutil.rmtree(out)
