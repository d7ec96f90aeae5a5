"""The reward functions of verl and flashrl: which one scores a `data_source`, the form of a right answer, its score.

They are listed here so that `prepare`, `train` and `eval` need not import verl, which takes seconds. A row whose data
source has no scorer would end a run at its first step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrl_cli.contract import EXACT_SOURCE, GYM_SOURCE
from flashrl_cli.errors import EnvironmentNotReady
from flashrl_cli.machine import software

PAID_IN_FULL = 1.0
"""Score that each of verl's scorers gives to a right answer."""
LONGEST_TRUTH = 10_000
"""Characters that a ground truth may have at most.

Scorers search it with regular expressions whose time grows with the square of its length.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A reward function, and the data sources that are sent to it.

    `answer` is the form in which a response gives the answer `{}`; None where a ground truth is not itself a right
    answer (tests of programs). `module` is the scorer's module in verl; a `light` one needs nothing but the standard
    library and is loaded without the rest of verl. `reads` is the number of characters at the end of a response that
    the scorer reads. `added` marks scorers that verl lacks (plugins/scorers.py).
    """

    module: str
    sources: frozenset[str]
    prefixes: tuple[str, ...] = ()
    answer: str | None = None
    light: bool = True
    reads: int = LONGEST_TRUTH
    added: bool = False


GSM8K = Scorer(module="gsm8k", sources=frozenset({"openai/gsm8k"}), answer="#### {}", reads=300)
MATH_REWARD = Scorer(
    module="math_reward",
    sources=frozenset({"lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"}),
    answer=r"\boxed{{{}}}",
)
DAPO = Scorer(
    module="math_dapo",
    sources=frozenset({"math_dapo", "math", "math_dapo_reasoning"}),
    prefixes=("aime",),
    answer="Answer: {}",
    reads=300,
)
PRIME_MATH = Scorer(
    module="prime_math",
    sources=frozenset(
        {
            "numina_aops_forum",
            "numina_synthetic_math",
            "numina_amc_aime",
            "numina_synthetic_amc",
            "numina_cn_k12",
            "numina_olympiads",
        }
    ),
    answer=r"\boxed{{{}}}",
    light=False,
)
PROGRAMS = Scorer(module="prime_code", sources=frozenset({"codecontests", "apps", "codeforces", "taco"}), light=False)
GEOMETRY = Scorer(
    module="geo3k",
    sources=frozenset({"hiyouga/geometry3k"}),
    answer="<think></think>\\boxed{{{}}}",
    light=False,
)
SEARCH = Scorer(
    module="search_r1_like_qa_em",
    sources=frozenset(
        f"searchR1_{name}"
        for name in ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
    ),
    answer="<answer>{}</answer>",
)
EXACT = Scorer(module="flashrl_cli.plugins.scorers", sources=frozenset({EXACT_SOURCE}), answer="{}", added=True)
VERLS = (GSM8K, MATH_REWARD, DAPO, PRIME_MATH, PROGRAMS, GEOMETRY, SEARCH)
"""In the order of verl 0.9.1's dispatch (verl/utils/reward_score/__init__.py:44-107)."""
GYM = Scorer(module="flashrl_cli.plugins.scorers", sources=frozenset(), prefixes=(GYM_SOURCE,), light=False, added=True)
"""Tasks of reasoning-gym, whose truths `prepare` scores when it generates them."""
SCORERS = (*VERLS, EXACT, GYM)
NAMES = frozenset[str]().union(*(scorer.sources for scorer in VERLS))
PREFIXES = tuple(prefix for scorer in VERLS for prefix in scorer.prefixes)


def scorer(data_source: str) -> Scorer | None:
    """The scorer of `data_source` in a run of flashrl's; None if there is none."""
    return next((s for s in SCORERS if data_source in s.sources or data_source.startswith(s.prefixes)), None)


def is_scored(data_source: str) -> bool:
    """Whether there is a scorer for `data_source`."""
    return scorer(data_source) is not None


def is_number(data_source: str) -> bool:
    """Whether the ground truth of `data_source` is a number."""
    return scorer(data_source) is GSM8K


def is_math(data_source: str) -> bool:
    """Whether the ground truth of `data_source` is a formula."""
    return scorer(data_source) in {MATH_REWARD, DAPO, PRIME_MATH}


def points(data_source: str, truth: Any) -> float:
    """Score of a response that gives `truth` itself in the form that the scorer of `data_source` reads.

    Raises ValueError if the data source has no such form, and whatever the scorer raises: ImportError if a library is
    missing.
    """
    found, response = scorer(data_source), right_answer(data_source, truth)
    if found is None or response is None:
        raise ValueError(f"no right answer can be written for {data_source!r}")
    with contextlib.redirect_stdout(io.StringIO()):  # some scorers print what they read
        if found.added:
            result = importlib.import_module(found.module).compute_score(data_source, response, truth)
        elif found.light:
            result = _light(found.module)(response, truth)
        else:
            result = importlib.import_module("verl.utils.reward_score").default_compute_score(
                data_source, response, truth
            )
    return float(result["score"] if isinstance(result, Mapping) else result)


def right_answer(data_source: str, truth: Any) -> str | None:
    """The response that gives `truth` itself in the form that the scorer of `data_source` reads; None without one."""
    found = scorer(data_source)
    return found.answer.format(_said(found, truth)) if found and found.answer else None


def require_verl() -> Path:
    """Folder of the installed verl, found without importing it; raises EnvironmentNotReady if there is none."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentNotReady(
            "verl is not installed, and its reward functions judge the rows' truths",
            hint="pip install --no-deps verl==0.9.1",
        )
    return Path(spec.submodule_search_locations[0])


def require_gym() -> None:
    """Raise EnvironmentNotReady if reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise EnvironmentNotReady(
            "reasoning-gym is not installed, which scores tasks that it generated", hint=software.install_extra("gym")
        )


def own_reward(keys: Mapping[str, Any]) -> bool:
    """Whether the verl keys of a run's `verl:` section replace verl's reward functions by other scorers."""
    given = _plain(keys)
    return bool(
        given.get("reward.custom_reward_function.path")
        or given.get("reward.reward_model.enable")
        or given.get("reward.reward_manager.source", "register") != "register"
    )


def own_rows(keys: Mapping[str, Any]) -> bool:
    """Whether the verl keys of a run's `verl:` section name a data set class of the user's."""
    return bool(_plain(keys).get("data.custom_cls.path"))


def prompt_column(keys: Mapping[str, Any]) -> str:
    """The column that holds the prompt, according to the verl keys of a run's `verl:` section."""
    return str(_plain(keys).get("data.prompt_key") or "prompt")


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lstrip("+"): value for key, value in keys.items()}


def _said(scorer: Scorer, truth: Any) -> Any:
    """What a response answers with for `truth`: the first of several golden answers."""
    if scorer is not SEARCH:
        return truth
    target = truth["target"]
    return target if isinstance(target, str) else target[0]


@functools.cache
def _light(module: str) -> Callable[[str, Any], Any]:
    """verl's `compute_score` in one module, loaded from its file without importing the rest of verl."""
    file = require_verl() / "utils" / "reward_score" / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"_verl_reward_{module}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {file}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    compute: Callable[[str, Any], Any] = loaded.compute_score
    return compute
