"""Hugging Face models on disk and on the hub: the cache, offline mode, and checks of a model's folder.

Only `resolves` and `from_hub` use the network.
"""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flashrl_cli import paths
from flashrl_cli.errors import InputError
from flashrl_cli.weights import PEFT_CONFIG, PEFT_WEIGHTS, Unreadable, model_files

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE = {"1", "on", "yes", "true"}


def hub_home(environment: Mapping[str, str], home: Path) -> Path:
    """Folder of all data of the Hugging Face libraries (huggingface_hub/constants.py)."""
    caches = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environment.get("HF_HOME") or caches / "huggingface").expanduser()


def hub_cache(environment: Mapping[str, str], home: Path) -> Path:
    """Folder of downloaded models (huggingface_hub/constants.py)."""
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser() if given else hub_home(environment, home) / "hub"


def offline(environment: Mapping[str, str]) -> str | None:
    """The environment variable that switches the hub off; None if no such variable is set."""
    return next((name for name in OFFLINE if environment.get(name, "").lower() in TRUE), None)


def resolves(environment: Mapping[str, str]) -> bool:
    """Whether the hub's host name resolves, or a proxy is configured.

    The hub's libraries would retry for half a minute without either.
    """
    if urllib.request.getproxies():
        return True
    host = urlsplit(environment.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def is_cached(model: str, cache: Path) -> bool:
    """Whether the cache has some revision of a hub model, judged by its config.json."""
    return any((cache / f"models--{model.replace('/', '--')}").glob("snapshots/*/config.json"))


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""Every tokenizer has at least one of these files."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADED = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "*.jinja"]


def hf_problem(folder: Path) -> str | None:
    """Why `folder` is not a complete HF model; None if it is.

    A complete model has a config.json and all safetensors files, either one file or those that its index names.
    """
    if problem := config_problem(folder):
        return problem
    index = folder / "model.safetensors.index.json"
    try:
        files = model_files(folder)
    except Unreadable:
        return f"{index.name} is damaged"
    missing = [file.name for file in files if not file.is_file() or not file.stat().st_size]
    if not missing:
        return None
    return f"missing or empty: {', '.join(missing)}" if index.is_file() else "no weights (model.safetensors)"


def config_problem(folder: Path) -> str | None:
    """Why `folder` has no readable config.json; None if it has one."""
    try:
        config = _config(folder)
    except OSError:
        return "no config.json"
    except ValueError:
        config = None
    return None if isinstance(config, dict) else "config.json is damaged"


def tokenizer_problem(folder: Path) -> str | None:
    """`no tokenizer` if `folder` has none; None if it has one."""
    return None if any((folder / name).is_file() for name in TOKENIZERS) else "no tokenizer"


def quantization(hf: Path) -> str | None:
    """Quantization method of the weights of the model `hf` (such as `fp8`); None if they are not quantized."""
    found = _config(hf).get("quantization_config")
    return str(found.get("quant_method") or "an unnamed method") if isinstance(found, dict) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name` of a model id on the hub."""
    return bool(_HUB_ID.fullmatch(name))


def model_folder(name: str) -> Path:
    """Folder of the HF model `name`, which is a folder or an id on the hub. Raises InputError if it is incomplete."""
    folder = paths.absolute(name)
    if not folder.exists() and is_hub_id(name):
        return from_hub(name)
    if problem := hf_problem(folder):
        raise InputError(f"{folder} is no HF model: {problem}", hint="name a folder with config.json and safetensors")
    return folder


def from_hub(name: str) -> Path:
    """Folder of the model or adapter `name` in the hub's cache, downloaded if necessary.

    Raises InputError if it is not in the cache and cannot be downloaded, or is not a model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    download = partial(
        snapshot_download, name, cache_dir=hub_cache(os.environ, Path.home()), allow_patterns=_DOWNLOADED
    )
    try:
        folder = Path(download(local_files_only=True))
        problem = _hub_problem(folder)
    except LocalEntryNotFoundError:
        problem = "it is not there"
    if problem is None:
        return folder
    if offline(os.environ) or not resolves(os.environ):
        raise InputError(
            f"{name} is no folder here and no model in the hub's cache ({problem}), and this machine is offline",
            hint=f"check the path, or where there is a network: hf download {name}",
        )
    try:
        folder = Path(download())
    except (HfHubHTTPError, OSError) as error:
        why = str(error).splitlines()[0]
        raise InputError(
            f"{name} is no folder here, and cannot be fetched: {why}", hint="check the path or the id"
        ) from None
    if problem := _hub_problem(folder):
        raise InputError(f"{name} on the hub is no HF model: {problem}", hint="name a model with safetensors")
    return folder


def _hub_problem(folder: Path) -> str | None:
    adapter = all((folder / name).is_file() for name in (PEFT_CONFIG, PEFT_WEIGHTS))
    return None if adapter else hf_problem(folder)


def _config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
