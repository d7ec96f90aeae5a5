"""What a smoothing profile says of itself, and what is refused; no tensor is touched."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from flashrl_cli.weights import Unreadable
from flashrl_cli.weights.profile import About, Profile
from tests.saved_files import saved_profile, saved_tensors

SCALES = {
    "norm.weight.rows": [0.5, 2.0, 1.0],
    "q.weight.columns": [2.0, 0.5, 1.0],
    "v.weight.columns": [2.0, 0.5, 1.0],
    "v.weight.rows": [4.0, 0.25],
    "v.bias.rows": [4.0, 0.25],
}
SHAPES = {"norm.weight": (3,), "q.weight": (5, 3), "v.weight": (2, 3), "v.bias": (2,), "lm_head.weight": (9, 3)}


def read(folder: Path, scales: dict[str, list[float]] = SCALES, **about: object) -> Profile:
    return Profile.read(saved_profile(folder / "p.safetensors", scales, **about))


def test_a_profile_names_tensors_and_their_scales(tmp_path: Path) -> None:
    profile = read(tmp_path, samples=7, alpha=0.5)
    assert profile.names == {"norm.weight", "q.weight", "v.weight", "v.bias"}
    assert profile.lengths["v.weight"] == (3, 2)
    assert profile.lengths["norm.weight"] == (None, 3)
    assert (profile.about.samples, profile.about.alpha) == (7, 0.5)
    assert profile.fits(SHAPES) is None


def test_what_it_writes_of_itself_is_what_is_read(tmp_path: Path) -> None:
    about = read(tmp_path).about
    assert set(about.metadata()) == {"flashrl_profile"}
    told = About(**{name: getattr(about, name) for name in About.__slots__})
    assert told == about


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ({"q.weight": (5, 4)}, r"q.weight as \[any, 3\], and the model's is \[5, 4\]"),
        ({"v.weight": (3, 3)}, r"v.weight as \[2, 3\], and the model's is \[3, 3\]"),
        ({"norm.weight": (4,)}, r"norm.weight as \[3, any\]"),
        ({"q.weight": (3,)}, "q.weight as"),
        ({"q.weight": (5, 3, 1)}, "q.weight as"),
    ],
)
def test_a_model_of_another_shape(tmp_path: Path, shapes: dict[str, tuple[int, ...]], why: str) -> None:
    assert re.search(why, str(read(tmp_path).fits({**SHAPES, **shapes})))


def test_a_model_without_a_tensor(tmp_path: Path) -> None:
    lacking = {name: shape for name, shape in SHAPES.items() if name != "v.bias"}
    assert read(tmp_path).fits(lacking) == "it smooths v.bias, which the model lacks"


def test_a_model_with_another_config(tmp_path: Path) -> None:
    profile = read(tmp_path, model="org/small", shape={"model_type": "qwen2", "hidden_size": 64, "head_dim": 16})
    assert profile.suits({"model_type": "qwen2", "hidden_size": 64, "vocab_size": 3}) is None
    told = profile.suits({"model_type": "qwen2", "hidden_size": 128})
    assert told == "it was made for org/small with hidden_size = 64, and the model has 128"
    assert "model_type = qwen2" in str(profile.suits({"model_type": "llama"}))


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0, math.inf, math.nan])
def test_scales_that_are_no_powers_of_two(tmp_path: Path, scale: float) -> None:
    with pytest.raises(Unreadable, match="no power of two"):
        read(tmp_path, {"a.columns": [1.0, scale]})


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="cannot be read"):
        Profile.read(tmp_path / "none.safetensors")
    with pytest.raises(Unreadable, match="is no smoothing profile"):
        Profile.read(saved_tensors(tmp_path / "model.safetensors", weight=b"12"))
    text = tmp_path / "text"
    text.write_text("no profile at all")
    with pytest.raises(Unreadable, match="torn"):
        Profile.read(text)
    with pytest.raises(Unreadable, match=r"holds a\.bytes"):
        read(tmp_path, {"a.bytes": [1.0]})
    with pytest.raises(Unreadable, match="smooths nothing"):
        read(tmp_path, {})
    with pytest.raises(Unreadable, match="no smoothing profile"):
        read(tmp_path, surprise=1)
    with pytest.raises(Unreadable, match="version 2 of the format, and this flashrl reads 1"):
        read(tmp_path, schema_version=2)


def test_a_cut_profile(tmp_path: Path) -> None:
    file = saved_profile(tmp_path / "p.safetensors", SCALES)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Unreadable, match="torn"):
        Profile.read(file)
