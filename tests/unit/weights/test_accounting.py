"""What is wrong with a checkpoint's tensors is found by names, shapes and dtypes, all of it at once, and no good one is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from flashrl_cli.weights.accounting import WRAPPERS, Expected, Shapes, account, expected, index_problems, not_finite
from flashrl_cli.weights.contents import Unreadable
from flashrl_cli.weights.reading import Stored
from tests.saved_files import saved_tensors

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
DENSE: Shapes = {EMBEDDING: (8, 4), DOWN: (4, 6), NORM: (4,), HEAD: (8, 4)}
FUSED: Shapes = {"model.layers.0.mlp.experts.down_proj": (2, 4, 6), NORM: (4,)}
APART: Shapes = {f"model.layers.0.mlp.experts.{one}.down_proj.weight": (4, 6) for one in (0, 1)} | {NORM: (4,)}
FILE = Path("m/model-00002-of-00002.safetensors")


def architecture(*forms: Shapes, tied: bool = False) -> Expected:
    return Expected(
        forms=forms or (DENSE,),
        optional=frozenset({HEAD} if tied else ()),
        ignored=(r"rotary_emb\.inv_freq$",),
        integers=frozenset({"model.counts"}),
    )


def there(shapes: Mapping[str, Sequence[int]], dtype: str = "BF16") -> dict[str, Stored]:
    return {name: Stored(shape=tuple(shape), dtype=dtype, read=str, file=FILE) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (there(DENSE), architecture()),
        (there(DENSE, "F16"), architecture()),
        (there(DENSE) | there({NORM: (4,)}, "F32"), architecture()),
        (there(DENSE), architecture(tied=True)),
        (there({name: shape for name, shape in DENSE.items() if name != HEAD}), architecture(tied=True)),
        (there(DENSE | {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}), architecture()),
        (there(DENSE | {"model.counts": (2,)}, "BF16"), architecture(DENSE | {"model.counts": (2,)})),
        (there(DENSE) | there({"model.counts": (2,)}, "I64"), architecture(DENSE | {"model.counts": (2,)})),
        (there(FUSED), architecture(FUSED, APART)),
        (there(APART), architecture(FUSED, APART)),
        (there({"module.a": (1,), "b": (1,)}), None),
        (there({"module.a": (1,)}), architecture({"module.a": (1,)})),
        (there({}), architecture({})),
    ],
    ids=[
        "bf16", "fp16", "mixed", "a tied head stored", "a tied head left out", "buffers of old", "a buffer",
        "an integer buffer", "experts fused", "experts one by one", "unknown", "a module called module", "nothing",
    ],
)  # fmt: skip
def test_what_is_whole_passes(found: dict[str, Stored], wanted: Expected | None, tmp_path: Path) -> None:
    account(tmp_path, found, wanted)


def without(*names: str) -> dict[str, Stored]:
    return there({name: shape for name, shape in DENSE.items() if name not in names})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (without(DOWN), [f"missing 1 tensor: {DOWN}"]),
        (without(DOWN, HEAD), [f"missing 2 tensors: {HEAD}, {DOWN}"]),
        (
            there(DENSE | {"model.layers.2.mlp.down_proj.weight": (4, 6)}),
            ["1 tensor that the architecture does not have"],
        ),
        (there(DENSE | {NORM: (5,)}), [f"{NORM} (in {FILE.name}) [5], not [4]"]),
        (there(DENSE | {DOWN: (0,)}), ["1 tensor is empty, as DeepSpeed's ZeRO-3 leaves", f"{DOWN} (in {FILE.name})"]),
        (there(DENSE | {DOWN: (4, 0), NORM: (0,)}), ["2 tensors are empty"]),
        (there(DENSE) | there({DOWN: (4, 6)}, "I8"), [f"1 tensor in I8 and not in floating point: {DOWN}"]),
        (there(DENSE) | there({DOWN: (4, 6)}, "F8_E4M3"), ["in F8_E4M3 and not in floating point"]),
        (
            without(DOWN) | there({NORM: (2,), "x": (1,)}),
            [f"missing 1 tensor: {DOWN}", "does not have: x", f"{NORM} (in {FILE.name}) [2], not [4]"],
        ),
    ],
    ids=[
        "a layer", "two", "too many", "a shape", "empty", "all empty", "integers", "8-bit floats",
        "three things at once",
    ],
)  # fmt: skip
def test_all_that_is_wrong_is_named(found: dict[str, Stored], said: list[str], tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as caught:
        account(tmp_path, found, architecture())
    assert [part for part in said if part not in str(caught.value)] == []


def test_an_expert_that_lacks(tmp_path: Path) -> None:
    found = there(dict(list(APART.items())[1:]))
    with pytest.raises(Unreadable, match=r"missing 1 tensor: model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight"):
        account(tmp_path, found, architecture(FUSED, APART))


def test_many_names_are_counted(tmp_path: Path) -> None:
    wanted: Shapes = {NORM: (4,), **{f"model.layers.{layer}.weight": (1,) for layer in range(40)}}
    with pytest.raises(Unreadable, match=r"missing 40 tensors: .* and 36 more"):
        account(tmp_path, there({NORM: (4,)}), architecture(wanted))


@pytest.mark.parametrize("wanted", [architecture(), None], ids=["known", "unknown"])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_wrappers_prefix_is_refused_with_the_fix(prefix: str, wanted: Expected | None, tmp_path: Path) -> None:
    """One sentence, and not each name as missing and as unknown; a prefix of some names alone is no wrapper's."""
    with pytest.raises(Unreadable) as caught:
        account(tmp_path, there({prefix + name: shape for name, shape in DENSE.items()}), wanted)
    assert str(caught.value).startswith(f"all tensors are named {prefix}…")
    assert "save the model" in str(caught.value)
    assert "missing" not in str(caught.value)
    with pytest.raises(Unreadable, match=r"missing 1 tensor.*1 tensor that the architecture does not have"):
        account(tmp_path, without(NORM) | there({prefix + NORM: (4,)}), architecture())


def test_what_a_file_beside_the_index_holds_is_said(tmp_path: Path) -> None:
    saved_tensors(tmp_path / "more.safetensors", "BF16", **{DOWN: bytes(48)})
    with pytest.raises(
        Unreadable, match=r"\(in more\.safetensors, which model\.safetensors\.index\.json does not name\)"
    ):
        account(tmp_path, without(DOWN), architecture())


def test_an_index_and_its_files(tmp_path: Path) -> None:
    """A file that is missing, empty, a link to nowhere or to itself; one of several that is not named; names in the
    wrong file.
    """
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = tmp_path / "model.safetensors.index.json"
    assert index_problems(tmp_path) == []
    saved_tensors(tmp_path / names[0], a=b"1")
    second = saved_tensors(tmp_path / names[1], b=b"1")
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert index_problems(tmp_path) == []
    gone = [f"{names[1]}, which model.safetensors.index.json names, is missing"]
    second.write_bytes(b"")
    assert index_problems(tmp_path) == gone
    for target in (tmp_path / "nowhere", second):
        second.unlink()
        second.symlink_to(target)
        assert index_problems(tmp_path) == gone
    second.unlink()
    index.write_text(json.dumps({"weight_map": {"a": names[0]}}))
    assert index_problems(tmp_path) == ["model.safetensors.index.json names 1 of 2 files"]
    saved_tensors(tmp_path / names[1], c=b"1")
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    lacks, holds = index_problems(tmp_path)
    assert lacks.endswith("says is in it: b")
    assert holds.endswith("does not place in it: c")
    for text in ('{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"):
        index.write_text(text)
        with pytest.raises(Unreadable, match="is damaged"):
            index_problems(tmp_path)


def test_values_that_are_no_numbers_are_named_with_their_files() -> None:
    names = [f"model.layers.{layer}.weight" for layer in range(6)]
    said = str(not_finite(names, {names[0]: FILE}))
    assert said.startswith(f"6 tensors with NaN or infinite values: {names[0]} (in {FILE.name}), {names[1]}, ")
    assert said.endswith(" and 2 more")


def test_what_was_built_is_kept_as_it_was() -> None:
    one = architecture(FUSED, APART, tied=True)
    assert Expected.of(one.text()) == one


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "qwen2", "quantization_config": {}}], ids=["no family", "quantized"]
)
def test_nothing_is_expected_of_what_is_not_known(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expected(tmp_path) is None
