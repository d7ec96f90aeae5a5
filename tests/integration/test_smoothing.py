"""Smoothing profiles on small models with planted outliers: nothing is changed but what INT8 loses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from flashrl_cli import contract
from flashrl_cli.data.rows import make_row
from flashrl_cli.data.tiny import make_tokenizer
from flashrl_cli.errors import EnvironmentNotReady, InputError, RunFailed
from flashrl_cli.quantize import calibrate as calibrate_module
from flashrl_cli.quantize import calibrate as scales
from flashrl_cli.quantize.calibrate import Calibrated, calibrate
from flashrl_cli.weights import Unreadable, Weights
from flashrl_cli.weights.profile import Profile

if TYPE_CHECKING:
    import torch

    Bucket = Iterable[tuple[str, torch.Tensor]]

pytestmark = pytest.mark.filterwarnings("ignore")
"""Importing vLLM warns of much that is not ours."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {}),
}
MAKERS = ("input_layernorm.weight", "post_attention_layernorm.weight", "v_proj.weight", "up_proj.weight")
OUTLIERS = [3, 17]
TEXT = list(range(40, 140))


def planted(kind: str, folder: Path) -> Path:
    """A random model, two query heads for each key-value head, in which some channels are much larger than others
    wherever one reads.
    """
    import torch
    import transformers

    name, more = KINDS[kind]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None, **more,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if key.endswith(MAKERS):
            parameter.data[OUTLIERS] *= 64
        if key.endswith("proj.weight"):
            parameter.data[:, OUTLIERS] /= 16
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are so small that threads wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty sums as `flashrl prepare` writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        make_row("sums", f"What is {n} + {n}?", str(2 * n), {"answer": f"{n} and {n} are {2 * n}"}) for n in range(20)
    ]
    file = tmp_path_factory.mktemp("sums") / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture(scope="module", params=KINDS)
def calibrated(request: pytest.FixtureRequest, parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each model's folder, and what was made for it."""
    folder = planted(request.param, tmp_path_factory.mktemp("planted") / "model")
    said: list[str] = []
    found = calibrate(folder, parquet, samples=16, alpha=None, out=folder.parent / "p.safetensors", say=said.append)
    assert said[-1] == "balanced: 8 of 8 places"
    return folder, found


def hidden(folder: Path, profile: Profile | None, dtype: torch.dtype, *, int8: bool = False) -> torch.Tensor:
    """The last hidden states by Transformers, of a model whose weights went through a profile, and through INT8."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if profile:
                parameter.copy_(profile.apply(name, parameter.data))
        for name, module in model.model.named_modules():
            if int8 and name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, inputs: (by_row(inputs[0]),))
                module.weight.copy_(by_row(module.weight))
        found: torch.Tensor = model.model(input_ids=torch.tensor([TEXT])).last_hidden_state
    return found


def by_row(values: torch.Tensor) -> torch.Tensor:
    """What a symmetric 8-bit grid with a step for each row leaves of `values`."""
    import torch

    steps = values.abs().max(dim=-1, keepdim=True).values / 127
    return torch.where(steps == 0, 0, torch.round(values / steps) * steps)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def test_a_smoothed_model_computes_what_it_did(calibrated: tuple[Path, Calibrated]) -> None:
    import torch

    folder, found = calibrated
    for dtype in (torch.float32, torch.bfloat16):
        plain, smoothed = (hidden(folder, profile, dtype) for profile in (None, found.profile))
        assert torch.equal(plain, smoothed), f"{dtype}: {off(smoothed, plain)}"
    layers = 2
    assert {name for name in found.profile.names if name.endswith("norm.weight")}, "norms must have taken up scales"
    assert sum(name.endswith("proj.weight") for name in found.profile.names) == 7 * layers


def test_int8_loses_much_less(calibrated: tuple[Path, Calibrated]) -> None:
    import torch

    folder, found = calibrated
    exact = hidden(folder, None, torch.float32)
    plain, smoothed = (off(hidden(folder, one, torch.float32, int8=True), exact) for one in (None, found.profile))
    assert found.error
    before, after = found.error
    assert smoothed < plain / 5, f"{plain} and {smoothed}"
    assert after < before / 5, f"{before} and {after}"
    assert all(layer.error[1] < layer.error[0] for layer in found.layers)
    assert all(layer.activation_max[1] < layer.activation_max[0] for layer in found.layers)


@pytest.mark.parametrize("calibrated", ["llama with biases"], indirect=True)
def test_the_document_tells_all_of_it(calibrated: tuple[Path, Calibrated]) -> None:
    folder, found = calibrated
    told = json.loads(json.dumps(found.document()))
    assert told["profile"] == str(folder.parent / "p.safetensors")
    assert len(told["layers"]) == 14
    assert told["error"]["before"] > told["error"]["after"]
    about = told["about"]
    assert about["fingerprint"] == Weights(hf=folder).fingerprint()
    assert (about["samples"], about["alpha"]) == (16, None)
    assert about["tokens"] > 16 * 30
    assert "14 of 14 layers smoothed" in found.verdict()


def test_the_same_input_gives_the_same_profile(parquet: Path, tmp_path: Path) -> None:
    folder = planted("qwen2 tied", tmp_path / "model")
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        calibrate(folder, parquet, samples=3, alpha=0.5, out=file, say=lambda _: None)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Profile.read(files[0]).about.alpha == 0.5


def test_a_profile_made_of_the_same_is_taken_and_no_other(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = planted("qwen2 tied", tmp_path / "model"), tmp_path / "p"
    first = calibrate(folder, parquet, samples=3, alpha=0.5, out=file, say=lambda _: None)
    content = file.read_bytes()
    monkeypatch.setattr(calibrate_module, "_worked_out", lambda *_: pytest.fail("the model was run again"))
    again = calibrate(folder, parquet, samples=3, alpha=0.5, out=file, say=lambda _: None)
    assert again.profile == first.profile
    assert (again.document()["already_there"], again.document()["error"]) == (True, None)
    assert "already there" in again.verdict()
    for samples, alpha in ((2, 0.5), (3, None)):
        with pytest.raises(InputError, match="exists already, and was made of another"):
            calibrate(folder, parquet, samples=samples, alpha=alpha, out=file, say=lambda _: None)
    assert file.read_bytes() == content


def test_nothing_to_gain(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planted("qwen2 tied", tmp_path / "model")
    monkeypatch.setattr(scales, "LEAST_GAIN", 0.999)
    with pytest.raises(RunFailed, match="smoothing gains nothing"):
        calibrate(folder, parquet, samples=3, alpha=None, out=tmp_path / "p", say=lambda _: None)
    assert not (tmp_path / "p").exists()


def test_what_cannot_be_calibrated(parquet: Path, tmp_path: Path) -> None:
    def refused(match: str, data: Path = parquet, alpha: float | None = None, samples: int = 2) -> None:
        with pytest.raises(InputError, match=match) as error:
            calibrate(folder, data, samples=samples, alpha=alpha, out=tmp_path / "p", say=lambda _: None)
        assert error.value.hint or error.value.problems or data != parquet

    folder = planted("qwen2 tied", tmp_path / "model")
    refused("alpha is 1", alpha=1.0)
    refused("nothing to calibrate on", samples=0)
    refused("rows cannot be used", data=folder / "config.json")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"qwen2"', '"gemma3"'))
    refused("not known for model_type gemma3")
    (folder / "config.json").write_text(config)
    (folder / "chat_template.jinja").unlink()
    refused("no chat template")
    (folder / "model.safetensors").unlink()
    refused(r"model\.safetensors is missing")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    about: Any = SimpleNamespace(metadata=dict)
    with pytest.raises(EnvironmentNotReady, match="cannot be written: I/O error: No space left") as caught:
        calibrate_module._save({"a": torch.ones(1)}, about, tmp_path / "p.safetensors")
    assert caught.value.hint == "--profile FILE elsewhere"
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planted("qwen2 tied", tmp_path / "model")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(EnvironmentNotReady, match=r"takes 0\.0 GiB in float32, and 0\.0 GiB are free"):
        calibrate(folder, parquet, samples=2, alpha=None, out=tmp_path / "p", say=lambda _: None)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Weights(hf=folder).tensors())


def refitted(
    sent: Bucket, monkeypatch: pytest.MonkeyPatch, profile: Path | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and what its loader is given in a refit of two buckets, under a profile that the environment names."""
    import torch

    from flashrl_cli.plugins import refit

    received: dict[str, torch.Tensor] = {}

    def load(bucket: Bucket) -> None:
        received.update((name, tensor.clone()) for name, tensor in bucket)

    if profile:
        monkeypatch.setenv(contract.ENV_ROLLOUT, contract.RolloutOptions(profile=str(profile)).text())
    monkeypatch.setattr(refit, "layerwise", lambda _model, _config, _device, stream, reused: stream(load))
    model, pairs = torch.nn.Module(), list(sent)

    def stream(load: Any) -> None:
        load(pairs[:5])
        load(pairs[5:])

    config = SimpleNamespace(hf_text_config=SimpleNamespace(model_type="llama"))
    refit.refit(model, config, torch.device("cpu"), stream, reused=True)
    return model, received


@pytest.mark.parametrize("calibrated", ["llama with biases"], indirect=True)
def test_a_refit_smooths_what_the_profile_names(
    calibrated: tuple[Path, Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from flashrl_cli.plugins.refit import SMOOTHED

    folder, found = calibrated
    sent, before = weights_of(folder), weights_of(folder)
    model, received = refitted(sent.items(), monkeypatch, found.profile.path)
    assert getattr(model, SMOOTHED) == len(found.profile.names)
    assert received.keys() == sent.keys()
    for name, tensor in sent.items():
        assert torch.equal(tensor, before[name]), "a bucket is verl's memory"
        assert torch.equal(received[name], found.profile.apply(name, tensor))
        assert torch.equal(received[name], tensor) == (name not in found.profile.names)
    in_float32, _ = refitted(((name, tensor.float()) for name, tensor in sent.items()), monkeypatch, None)
    assert getattr(in_float32, SMOOTHED) == len(found.profile.names)


def test_a_refit_without_a_profile(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashrl_cli.plugins.refit import SMOOTHED

    sent = weights_of(planted("qwen2 tied", tmp_path / "model"))
    model, received = refitted(sent.items(), monkeypatch, None)
    assert getattr(model, SMOOTHED) == 0
    assert all((received[name] == tensor).all() for name, tensor in sent.items())


@pytest.mark.parametrize("calibrated", ["llama with biases"], indirect=True)
def test_half_a_refit_and_another_model_are_refused(
    calibrated: tuple[Path, Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = calibrated
    sent = weights_of(folder)
    lacking = {name: tensor for name, tensor in sent.items() if "layers.1.mlp" not in name}
    with pytest.raises(Unreadable, match=r"lacked \d tensors that the profile smooths"):
        refitted(lacking.items(), monkeypatch, found.profile.path)
    wrong = {name: tensor[..., :-1] for name, tensor in sent.items()}
    with pytest.raises(Unreadable, match="is of another model"):
        refitted(wrong.items(), monkeypatch, found.profile.path)
