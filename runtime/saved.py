"""Which file a session was recovered from, and whether it is still as somebody left it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Size and time of the last change of a file.
Look = tuple[int, int]


def look(path: Path) -> Look | None:
    """What a file looks like; None if it is not there. Equal looks: nobody has written it meanwhile."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Saved:
    """The file that a session was recovered from.

    Attributes:
        path: likewise.
        seen: what it looked like then.
    """

    path: Path
    seen: Look | None

    def lies_in(self, folder: Path) -> bool:
        """Whether it lies in this folder."""
        return self.path.parent.resolve() == folder.resolve()

    @property
    def untouched(self) -> bool:
        """Whether nobody has written or removed it since."""
        return look(self.path) == self.seen
