"""Checkpoint files: safetensors with a JSON document, every byte of it under a checksum.

The document and the digest of the file's header stand in the safetensors metadata, a digest of each tensor's bytes in
the document. The header's digest is taken with its own 64 characters as zeros. Files appear under their name whole
or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from djinn_fx.errors import CheckpointError, DjinnError

FORMAT = 1

#: The longest header that safetensors reads.
LONGEST_HEADER = 100_000_000

#: How the address of a local file begins.
_LOCAL = ("file://", "local://")

_NO_DIGEST = "0" * 64
_FORMAT_FIELD = re.compile(rb'"djinn_format":"(\d+)"')
_DIGEST_FIELD = re.compile(rb'"djinn_sha256":"([0-9a-f]{64})"')
_AGAIN = "Restore from another copy, or take the checkpoint again."


def write_file(
    path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Path | str:
    """Write a checkpoint file; ``tensors`` lie on the CPU. Returns what :func:`read_file` takes: path or address.

    Raises:
        CheckpointError: it could not be written; nothing changed under the name.
    """
    try:
        held = _apart(tensors)
        checksums = {name: _checksum(tensor) for name, tensor in held.items()}
        written = json.dumps({**document, "checksums": checksums}, allow_nan=False, separators=(",", ":"))
    except MemoryError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {os.fspath(path)!r}: no host memory to put it together ({error}). Nothing "
            "changed under that name; free host memory and save it again."
        ) from error
    metadata = {"djinn_format": str(FORMAT), "djinn_sha256": _NO_DIGEST, "djinn": written}
    if is_url(path):
        _write_url(os.fspath(path), held, metadata)
        return os.fspath(path)
    target = local(path)
    if not target.name:
        raise CheckpointError(f"cannot write the checkpoint {os.fspath(path)!r}: it names a folder. Name a file in it.")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # as the user's umask wants it; safetensors would keep the file from everyone else
        save_file(held, draft, metadata)
        draft.chmod(mode)
        _seal(draft)
        os.replace(draft, target)
    except (OSError, SafetensorError, MemoryError, ValueError) as error:  # a name with a NUL is a ValueError
        said = (isinstance(error, OSError) and error.strerror) or error  # without the draft's name
        raise CheckpointError(
            f"cannot write the checkpoint {str(target)!r}: {said}. Nothing changed under that name; see that the "
            "folder exists, is writable and has room."
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            draft.unlink(missing_ok=True)
    try:
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {str(target)!r} is written, whole, but its folder cannot be synced: {error}. It can be "
            "restored; whether it outlasts a power failure is not certain. Save it elsewhere as well."
        ) from error
    return target


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a checkpoint file and check every byte of it.

    Raises:
        CheckpointError: not readable, cut off, damaged, not a checkpoint, or of another format.
    """
    if is_url(path):
        address = os.fspath(path)
        with tempfile.TemporaryDirectory(prefix="djinn-") as folder:
            return _read(_fetched(address, Path(folder) / "checkpoint.safetensors"), address)
    return _read(local(path), str(local(path)))


def _read(source: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A file and what users call it."""
    try:
        document = _document(source, name)
        checksums = document.pop("checksums")
        with safe_open(source, "pt") as file:
            # Copied: what the file's mapping shows may change with the file.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {name!r}: {error}. Check the path.") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, DjinnError):
            raise
        raise CheckpointError(f"cannot read the checkpoint {name!r}: no memory for it ({error}).") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(name, f"its contents do not fit together ({error})") from error
    found = {key: _checksum(tensor) for key, tensor in tensors.items()}
    for key in checksums | found:
        if checksums.get(key) != found.get(key):
            raise _damaged(name, f"tensor {key!r} does not match its checksum")
    return document, tensors


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address that fsspec serves, other than of a local file."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith(_LOCAL)


def local(path: str | os.PathLike[str]) -> Path:
    """The local file of a path or of an address of a local file."""
    return Path(os.fspath(path).removeprefix(_LOCAL[0]).removeprefix(_LOCAL[1]))


def _write_url(address: str, held: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write to an address, with one call of its file system: what is whole then, and when, is up to that one."""
    with tempfile.TemporaryDirectory(prefix="djinn-") as folder:
        draft = Path(folder) / "checkpoint.safetensors"
        try:
            save_file(dict(held), draft, metadata)
            _seal(draft)
            system, place = _system(address)
            system.pipe_file(place, draft.read_bytes())
        except CheckpointError:
            raise
        except Exception as error:  # whatever a file system of somebody else's raises
            raise CheckpointError(
                f"cannot write the checkpoint {address!r}: {type(error).__name__}: {error}. See that the address is "
                "right, may be written and has room."
            ) from error


def _fetched(address: str, to: Path) -> Path:
    """What lies at an address, in a local file."""
    try:
        system, place = _system(address)
        to.write_bytes(system.cat_file(place))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"cannot read the checkpoint {address!r}: {type(error).__name__}: {error}. Check the address."
        ) from error
    return to


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the place in it."""
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise CheckpointError(f"{address!r} needs fsspec: pip install fsspec.") from error
    system, place = url_to_fs(address)
    return system, place


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors contiguous, no two in one storage: safetensors wants them so."""
    made: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        made[name] = tensor if whole and place not in places else tensor.clone(memory_format=torch.contiguous_format)
        places.add(place)
    return made


def _checksum(tensor: torch.Tensor) -> list[Any]:
    """Dtype, shape and the sha256 of the bytes."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    found = hashlib.sha256(data.data).hexdigest()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), found]


def _seal(draft: Path) -> None:
    """Put the header's digest into a file just written, and see it on the disk."""
    with draft.open("r+b") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
        if len(header) > LONGEST_HEADER:
            raise OSError(f"the session's history takes {len(header)} bytes, a header holds {LONGEST_HEADER}")
        file.seek(header.index(_NO_DIGEST.encode(), header.index(b'"djinn_sha256"')))
        file.write(hashlib.sha256(header).hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """See a renamed file's new name on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _document(source: Path, name: str) -> dict[str, Any]:
    """The JSON document of a file whose header is sound and whose length is what the header says."""
    size = source.stat().st_size
    with source.open("rb") as file:
        header = file.read(8)
        length = int.from_bytes(header, "little")
        header += file.read(min(length, LONGEST_HEADER))
    if len(header) < 8 + length:
        if size < 10 or b"djinn_format" in header or size < 8 + length <= LONGEST_HEADER:
            raise _damaged(name, f"it is cut off after {size} bytes")
        raise _foreign(name)
    _check_header(name, header)
    entries = json.loads(header[8:])
    metadata = entries.pop("__metadata__")
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != len(header) + end:
        state = "cut off" if size < len(header) + end else "longer than it was written"
        raise _damaged(name, f"it is {state}: {size} bytes instead of {len(header) + end}")
    document: dict[str, Any] = json.loads(metadata["djinn"])
    return document


def _check_header(name: str, header: bytes) -> None:
    version, digest = _FORMAT_FIELD.search(header), _DIGEST_FIELD.search(header)
    if version is None and digest is None:
        raise _foreign(name)
    if version is not None and int(version[1]) != FORMAT:
        raise CheckpointError(
            f"{name!r} says it is a checkpoint of format {int(version[1])}; this version of djinn_fx reads "
            f"format {FORMAT}. Read it with the version that wrote it, or take the checkpoint again."
        )
    if version is None or digest is None:
        raise _damaged(name, "its header lacks a field")
    blank = header[: digest.start(1)] + _NO_DIGEST.encode() + header[digest.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() != digest[1]:
        raise _damaged(name, "its header does not match its checksum")


def _damaged(name: str, how: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint {name!r} is damaged: {how}. {_AGAIN}")


def _foreign(name: str) -> CheckpointError:
    return CheckpointError(f"{name!r} is not a djinn_fx checkpoint. Give a file that Checkpoint.save() wrote, whole.")
