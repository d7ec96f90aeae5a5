"""Token ids of prompts are those that Transformers' own tokenizers give to text written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashrl_cli.data.tiny import make_tokenizer
from flashrl_cli.errors import InputError
from flashrl_cli.weights import Unreadable
from flashrl_cli.worker.engine import tokenizer_of, tokens_of

SHOTS = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "What is 1 plus 2?"},
    {"role": "assistant", "content": "#### 3"},
    {"role": "user", "content": "What is 4 plus 5?"},
]
CHAT = (
    "<|im_start|>system\nAdd.<|im_end|>\n"
    "<|im_start|>user\nWhat is 1 plus 2?<|im_end|>\n"
    "<|im_start|>assistant\n#### 3<|im_end|>\n"
    "<|im_start|>user\nWhat is 4 plus 5?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PLAIN = "Add.\n\nWhat is 1 plus 2?\n#### 3\n\nWhat is 4 plus 5?\n"
QA = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:{% elif m.role == 'assistant' %}"
    " {{ m.content }}\n\n{% endif %}{% endfor %}{{ '<think>' if think else '' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template, as a model has it on disk."""
    place = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(place)
    (place / "config.json").write_text('{"model_type": "qwen2"}')
    return place


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def test_the_chat_template_of_the_model(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    assert tokens_of(tokenizer, SHOTS) == ids(tokenizer, CHAT)
    own = tokenizer.apply_chat_template(SHOTS, add_generation_prompt=True, return_dict=False)
    assert tokens_of(tokenizer, SHOTS) == own


@pytest.mark.parametrize("begins", [False, True])
def test_no_template(folder: Path, begins: bool) -> None:
    """The text begins as the tokenizer begins a text, for a model that was trained so."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(folder, chat=False)
    if begins:
        start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
        )
    first = [tokenizer.convert_tokens_to_ids("<|endoftext|>")] * begins
    assert tokens_of(tokenizer, SHOTS, chat_template="") == [*first, *ids(tokenizer, PLAIN)]
    assert tokens_of(tokenizer, SHOTS) == ids(tokenizer, CHAT), "a template writes what begins a text itself"


def test_another_template_with_variables(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, chat=False)
    text = "Q: What is 1 plus 2?\nA: #### 3\n\nQ: What is 4 plus 5?\nA:"
    assert tokens_of(tokenizer, SHOTS, chat_template=QA) == ids(tokenizer, text)
    assert tokens_of(tokenizer, SHOTS, chat_template=QA, arguments={"think": True}) == ids(tokenizer, f"{text}<think>")
    tokenizer.chat_template = QA
    assert tokens_of(tokenizer, SHOTS, arguments={"think": True}) == ids(tokenizer, f"{text}<think>")
    assert tokens_of(tokenizer, SHOTS, arguments={"think": False}) == ids(tokenizer, text)


def test_templates_that_make_no_prompt(folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(folder)
    for template, problem in (
        ("{% for m in messages %}", "unexpected|Unexpected"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "does not contain the question: ''"),
    ):
        with pytest.raises(InputError, match=f"--chat-template: .*({problem})"):
            tokens_of(tokenizer, SHOTS, chat_template=template)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(Unreadable, match="refuses a prompt: System role not supported"):
        tokens_of(tokenizer, SHOTS)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(Unreadable, match=r"has no chat template .*--chat-template none"):
        tokenizer_of(tmp_path)
    assert tokens_of(tokenizer_of(tmp_path, chat=False), SHOTS, chat_template=QA)
