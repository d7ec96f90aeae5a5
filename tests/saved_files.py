"""Checkpoints as verl leaves them, made of small zip files like torch.save's, for tests that know no torch."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

from flashrl_cli.verl import checkpoints as layout


def saved_file(file: Path, tensors: int = 3) -> Path:
    """A file like torch.save's: stored, a pickle first, then each tensor's bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{file.stem}/data.pkl", b"\x80\x02}q\x00." * 20)
        for number in range(tensors):
            archive.writestr(f"{file.stem}/data/{number}", bytes(range(256)) * 4)
        archive.writestr(f"{file.stem}/version", b"3\n")
    return file


def saved_tensors(file: Path, dtype: str = "U8", /, **tensors: bytes) -> Path:
    """A safetensors file of tensors of one dimension, with one byte a number or, in another dtype, two."""
    entries, offset = {}, 0
    for name, data in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": [len(data) // (1 if dtype == "U8" else 2)],
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    text = json.dumps(entries).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))
    return file


def saved_profile(file: Path, scales: dict[str, list[float]], **about: object) -> Path:
    """A smoothing profile with these scales; `about` replaces what it says of itself."""
    known: dict[str, object] = {"model": "m", "fingerprint": "f", "shape": {}, "versions": {}}
    told = {**known, "data": "d", "alpha": None, "samples": 1, "tokens": 2, **about}
    entries: dict[str, object] = {"__metadata__": {"flashrl_profile": json.dumps(told)}}
    data = b""
    for name, values in scales.items():
        packed = struct.pack(f"<{len(values)}f", *values)
        offsets = [len(data), len(data) + len(packed)]
        entries[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": offsets}
        data += packed
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def saved_model(model: Path, *, world_size: int = 2, parts: tuple[str, ...] = tuple(layout.PARTS)) -> Path:
    """An `actor/` or `critic/` with all that verl writes there by default."""
    for file in layout.part_files(model, world_size, parts):
        saved_file(file)
    (model / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
    hf = model / "huggingface"
    hf.mkdir()
    (hf / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    (hf / "tokenizer_config.json").write_text("{}")
    return model


def saved_step(run: Path, step: int, *, critic: bool = False, world_size: int = 2) -> Path:
    """A complete `global_step_N`; the tracker is left alone."""
    folder = run / f"global_step_{step}"
    saved_model(folder / "actor", world_size=world_size)
    if critic:
        saved_model(folder / "critic", world_size=world_size)
    saved_file(folder / "data.pt")
    return folder


def saved_queue(step: Path, units: int = 2) -> Path:
    """The `transfer_queue/` that asynchronous modes save with a step."""
    folder = step / "transfer_queue"
    (folder / "simple_storage").mkdir(parents=True)
    names = [{"position": number, "storage_unit_id": f"TQ_STORAGE_UNIT_{number}a"} for number in range(units)]
    (folder / "metadata.json").write_text(json.dumps({"storage_saved": True, "user_metadata": {"global_steps": 1}}))
    (folder / "simple_storage" / "storage_unit_info.json").write_text(json.dumps(names))
    (folder / "controller_state.pkl").write_bytes(pickle.dumps({"partitions": {"train": [1, 2, 3]}}))
    for number in range(units):
        unit = folder / "simple_storage" / f"su_{number}_TQ_STORAGE_UNIT_{number}a.pkl"
        unit.write_bytes(pickle.dumps({"field_data": {"prompts": list(range(100))}}))
    return folder


def cached_model(cache: Path, name: str) -> Path:
    """A model in a cache of the hub's."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    folder = place / "snapshots" / commit
    saved_tensors(folder / "model.safetensors", a=b"1")
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    return folder
