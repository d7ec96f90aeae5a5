"""HF models on disk and on the Hugging Face hub: its cache and offline switch, and what makes a folder a model.

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
    """Folder of everything from the hub (huggingface_hub/constants.py)."""
    caches = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environment.get("HF_HOME") or caches / "huggingface").expanduser()


def hub_cache(environment: Mapping[str, str], home: Path) -> Path:
    """Folder of downloaded models (huggingface_hub/constants.py)."""
    given = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser() if given else hub_home(environment, home) / "hub"


def offline(environment: Mapping[str, str]) -> str | None:
    """The variable that keeps this machine off the hub, if one does."""
    return next((name for name in OFFLINE if environment.get(name, "").lower() in TRUE), None)


def resolves(environment: Mapping[str, str]) -> bool:
    """Whether the hub can be named, here or by a proxy; without that its libraries would try for half a minute."""
    if urllib.request.getproxies():
        return True
    host = urlsplit(environment.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def is_cached(model: str, cache: Path) -> bool:
    """Whether some revision of a hub model is in the cache: its config.json is."""
    return any((cache / f"models--{model.replace('/', '--')}").glob("snapshots/*/config.json"))


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""Files one of which every tokenizer has."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADED = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "*.jinja"]


def hf_problem(folder: Path) -> str | None:
    """Why `folder` is no complete HF model (config, and safetensors in one file or as indexed); None if it is."""
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
    """Why `folder` has no readable config.json; None if it has."""
    try:
        config = _config(folder)
    except OSError:
        return "no config.json"
    except ValueError:
        config = None
    return None if isinstance(config, dict) else "config.json is damaged"


def tokenizer_problem(folder: Path) -> str | None:
    """`no tokenizer` if `folder` has none; None if it has."""
    return None if any((folder / name).is_file() for name in TOKENIZERS) else "no tokenizer"


def quantization(hf: Path) -> str | None:
    """Method by which the weights of the model `hf` are quantized (`fp8`, …); None if they are not."""
    found = _config(hf).get("quantization_config")
    return str(found.get("quant_method") or "an unnamed method") if isinstance(found, dict) else None


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name` of a model on the hub."""
    return bool(_HUB_ID.fullmatch(name))


def model_folder(name: str) -> Path:
    """The complete HF model that `name` stands for: a folder, or an id on the hub. Raises InputError if it is none."""
    folder = paths.absolute(name)
    if not folder.exists() and is_hub_id(name):
        return from_hub(name)
    if problem := hf_problem(folder):
        raise InputError(f"{folder} is no HF model: {problem}", hint="name a folder with config.json and safetensors")
    return folder


def from_hub(name: str) -> Path:
    """Folder of the model or adapter `name` in the hub's cache, downloaded unless offline. Raises InputError."""
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
