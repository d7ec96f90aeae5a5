"""A dry run starts nothing, writes nothing and asks nobody, as the interpreter itself sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")

WATCHED = """
import json, os, sys
seen = []
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system", \
"socket.connect", "socket.getaddrinfo")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", \
"os.utime", "shutil.")
def hook(event, args):
    if event.startswith(STARTS + CHANGES):
        seen.append([event, str(args)])
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if args[0] != os.devnull:
            seen.append([event, str(args)])
sys.addaudithook(hook)
from flashrl_cli.cli.app import main
sys.argv = ["flashrl", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(json.dumps({"exit": end.code or 0, "seen": seen}), file=sys.stderr)
"""


def watched(folder: Path, *words: str) -> tuple[dict[str, object], str]:
    command = [sys.executable, "-B", "-c", WATCHED, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1]), done.stdout


@pytest.mark.parametrize("preset", ["dapo-32b", "tiny"])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_dry_run_leaves_no_trace(preset, form, tmp_path):
    report, out = watched(tmp_path, "train", "--preset", preset, "--tis", "8", "--dry-run", *form)
    assert report == {"exit": 0, "seen": []}
    assert preset in out
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees(tmp_path):
    (tmp_path / "source").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"source/{split}.jsonl").write_text('{"question": "1+1?", "answer": "2 #### 2"}\n')
    report, _ = watched(tmp_path, "prepare", "gsm8k", "--source", "source", "--out", "out")
    assert report["seen"]
