"""Whatever stands in a preset's file or after `--set`: it loads, or ends in an InputError that can be printed."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrl_cli.config.diagnose import keys_of
from flashrl_cli.config.resolve import load_spec
from flashrl_cli.config.spec import RunSpec
from flashrl_cli.errors import InputError
from flashrl_cli.render.output import print_error

BASE = """\
model: {path: Qwen/Qwen3-0.6B}
data: {train: gsm8k, val: gsm8k, train_batch_size: 64, max_prompt_length: 100, max_response_length: 28}
algorithm: {advantage: grpo, lr: 1e-6, mini_batch_size: 32}
rollout: {n: 8}
trainer: {project: p}
"""
QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
SCRAPS = st.sampled_from(
    ["\n", "\t", ": ", "- ", "[", "]", "{", "}", "'", '"', "*a", "&a ", "!x ", "<<: ", "---\n", "\0"]
)
TEXT = st.text(max_size=20) | SCRAPS
EDITS = st.lists(st.tuples(st.integers(0, len(BASE)), TEXT, st.integers(0, 3)), min_size=1, max_size=4)


def told(preset: Path, *sets: str) -> None:
    """Load a preset; the only thing that may come of it is an InputError, and it can be printed."""
    try:
        load_spec(str(preset), sets=sets)
    except InputError as error:
        print_error(error)


@given(EDITS)
@QUICK
def test_a_preset_edited_at_random(tmp_path: Path, edits: list[tuple[int, str, int]]) -> None:
    text = BASE
    for start, new, dropped in edits:
        text = text[:start] + new + text[start + dropped :]
    (tmp_path / "p.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    told(tmp_path / "p.yaml")


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@QUICK
def test_a_random_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "p.yaml").write_bytes(raw)
    told(tmp_path / "p.yaml")


@given(st.text(max_size=30) | st.tuples(st.sampled_from([*keys_of(RunSpec), "env.A", "verl.a"]), TEXT).map("=".join))
@QUICK
def test_a_random_assignment(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(BASE)
    told(tmp_path / "p.yaml", text)
