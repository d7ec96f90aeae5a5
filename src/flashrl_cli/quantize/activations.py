"""What linear layers are given when a model reads worked answers: the largest value of each channel, and some rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flashrl_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from flashrl_cli.evals.questions import Question

MAX_TOKENS = 1024
"""A sample is cut here."""
KEPT = 256
"""Rows of a layer's input that errors are measured on, from all samples alike."""


def texts(questions: Sequence[Question], count: int) -> list[list[dict[str, str]]]:
    """`count` worked conversations, spread evenly over the data: the prompt and the solution, else the final answer, if there is one."""
    count = max(0, min(count, len(questions)))
    return [_worked(questions[number * len(questions) // count]) for number in range(count)]


def _worked(question: Question) -> list[dict[str, str]]:
    solution = (question.extra_info or {}).get("answer")
    answer = solution if isinstance(solution, str) and solution.strip() else question.ground_truth
    return question.prompt if answer is None else [*question.prompt, {"role": "assistant", "content": str(answer)}]


def tokens(folder: Path, conversations: Iterable[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation by the model's own chat template. Raises InputError if it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer that can be read in {folder}: {str(error).splitlines()[0]}") from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer in {folder} has no chat template", hint="put chat_template.jinja beside it")
    rows: list[list[int]] = [tokenizer.apply_chat_template(one, return_dict=False) for one in conversations]
    return [row[:MAX_TOKENS] for row in rows if len(row) > 1]


class Seen:
    """Inputs of one layer: `peak` [K] is max|X_j| of all tokens, `rows` [about KEPT, K] are those of some; float32.

    A sample's first token is left out: its activations are huge in many models and like no other token's (Sun et al. 2024,
    arXiv 2402.17762), and scales that even them out spoil the weights for all others. Per-token scales keep it to itself.
    """

    def __init__(self, samples: int) -> None:
        self._each = -(-KEPT // samples)
        self._kept: list[torch.Tensor] = []
        self.peak: Any = None

    def add(self, inputs: torch.Tensor) -> None:
        """Take the inputs [1, T, K] of one sample of two tokens or more."""
        import torch

        flat = inputs.detach()[0, 1:]
        peak = flat.abs().amax(0).float()
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self._kept.append(flat[:: max(1, len(flat) // self._each)][: self._each].cpu())

    def rows(self, device: torch.device) -> torch.Tensor:
        """The rows that were kept."""
        import torch

        return torch.cat(self._kept).to(device).float()


@contextmanager
def watching(model: torch.nn.Module, readers: Iterable[str], samples: int) -> Iterator[dict[str, Seen]]:
    """Within, what the modules named `readers` are given is seen."""
    seen = {name: Seen(samples) for name in readers}
    hooks = [model.get_submodule(name).register_forward_pre_hook(_adder(one)) for name, one in seen.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _adder(seen: Seen) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    return lambda _, inputs: seen.add(inputs[0])
