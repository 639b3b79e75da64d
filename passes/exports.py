"""Captured graphs on disk, so that a second process need not export again.

One file per graph, named by its key (:mod:`djinn_fx.passes.identity`): safetensors that hold the document of
:mod:`djinn_fx.passes.codec`, the constants made by tracing, and a checksum of both and of the key. Files appear whole
or not at all, so any number of processes may share a folder. A cache is never in the way: what cannot be read is
exported again, and what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from djinn_fx.passes.codec import Captured, decode, encode

#: Environment variable with the folder; ``off`` or nothing switches the cache off.
VARIABLE = "DJINN_CACHE_DIR"

#: Most bytes of all files together; beyond, those not used for longest go.
MOST_BYTES = 2 << 30

_SUFFIX = ".safetensors"
_DOCUMENT, _CHECKSUM = "djinn.document", "djinn.checksum"
#: A draft older than this many seconds was left by a process that ended.
_STALE = 3600.0


@dataclass(frozen=True)
class ExportCache:
    """A folder of captured graphs.

    Attributes:
        folder: where they lie; made when the first one is written.
        most_bytes: what all files together may take.
    """

    folder: Path
    most_bytes: int = MOST_BYTES

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ExportCache | None:
        """The cache that the environment asks for; None where it is switched off.

        ``DJINN_CACHE_DIR`` names the folder; by default it lies in the user's cache folder. A folder in the home of
        a user that there is not is none.
        """
        named = environment.get(VARIABLE)
        if named is not None:
            named = named.strip()
            if named.lower() in ("", "off", "0", "no", "false"):
                return None
            try:
                return cls(Path(named).expanduser())
            except RuntimeError:  # the home of nobody
                return None
        user = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return cls(Path(user) / "djinn_fx" / "exports")

    def load(self, key: str, clone: nn.Module) -> Captured | None:
        """The graph kept under ``key``, over the tensors of ``clone``; None if there is none that is sound."""
        path = self._path(key)
        try:
            tensors = load(path.read_bytes())
            checksum = tensors.pop(_CHECKSUM)
            if not torch.equal(checksum, _checksum(key, tensors)):
                return None
            document = tensors.pop(_DOCUMENT)
            found = decode(json.loads(zlib.decompress(document.numpy().tobytes())), tensors, clone)
        except Exception:  # absent, cut off, of an earlier format, damaged: whatever it is, an export helps
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def save(self, key: str, captured: Captured, clone: nn.Module) -> bool:
        """Keep a graph under ``key``; whether that was possible."""
        try:
            document, constants = encode(captured, clone)
            packed = zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 1)
            tensors = {**constants, _DOCUMENT: torch.frombuffer(bytearray(packed), dtype=torch.uint8)}
            content = save({**tensors, _CHECKSUM: _checksum(key, tensors)})
        except Exception:  # a graph that has no form here is exported anew in each process, as without a cache
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{key}.{secrets.token_hex(4)}.tmp"
            try:
                draft.write_bytes(content)
                os.replace(draft, self._path(key))
            finally:
                draft.unlink(missing_ok=True)
            self._prune()
        except OSError:
            return False
        return True

    def _path(self, key: str) -> Path:
        return self.folder / (key + _SUFFIX)

    def _prune(self) -> None:
        """Remove the files that were not used for longest, until the rest is small enough."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may be removing it
                status = path.stat()
                if path.suffix == _SUFFIX:
                    found.append((status.st_mtime, status.st_size, path))
                elif path.suffix == ".tmp" and time.time() - status.st_mtime > _STALE:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.most_bytes:
                break
            total -= size
            with contextlib.suppress(OSError):
                path.unlink()


def _checksum(key: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A sha256 of the key and of names, forms and bytes, uint8 ``[32]``: a file under another's name is unsound."""
    digest = hashlib.sha256(f"{key}\n".encode())
    for name, tensor in sorted(tensors.items()):
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(content.tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
