"""Files that appear whole or not at all."""

from __future__ import annotations

from typing import Any

__all__ = ["write_whole"]


def write_whole(path: Any, content: bytes) -> Any:
    """Write ``content`` beside ``path`` and move it there; returns the path. Local or a bucket (etils.epath); the folder is
    made if missing."""
    from etils import epath

    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / (path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path
