"""What folders hold, in bytes."""

from __future__ import annotations

import os
from pathlib import Path


def size(folder: Path) -> int:
    """Bytes of all files below `folder`, links not followed; 0 if there is none. What goes away meanwhile does not count."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    total += (
                        size(Path(entry.path))
                        if entry.is_dir(follow_symlinks=False)
                        else entry.stat(follow_symlinks=False).st_size
                    )
                except OSError:
                    continue
    except OSError:
        return 0
    return total
