"""Read uncompressed zip files of `torch.save` and `np.savez`, with a check of every byte."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
import zlib
from typing import NamedTuple

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_SIGNATURE = b"PK\x03\x04"
_CHUNK = 2**22
_BROKEN = (  # what zipfile raises for a damaged archive
    zipfile.BadZipFile, struct.error, OSError, EOFError, RuntimeError, UnicodeError, ValueError,
)  # fmt: skip


class Member(NamedTuple):
    """The position of the bytes of a member in the archive.

    Attributes:
      start: The position of its first byte in the file.
      size: The number of its bytes.
    """

    start: int
    size: int


class Compressed(ValueError):
    """The members of the archive are compressed."""


class Damaged(ValueError):
    """The file is not a zip archive, or it was altered."""


def members(path: pathlib.Path) -> dict[str, Member]:
    """Return the members of an archive by name, after a check of their content.

    Both headers of a member must agree, members may not overlap, and checksums must be correct, so
    that a flipped offset is an error and not another tensor.

    Raises:
      Damaged: The archive is truncated, altered, or not a zip archive.
      Compressed: Members are compressed, so that their size is not known.
    """
    try:
        with zipfile.ZipFile(path) as opened, path.open("rb") as file:
            entries = opened.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Compressed
            found = {entry.filename: _member(entry, file) for entry in entries}
            if len(found) < len(entries):
                raise Damaged("a name occurs twice")
            _check_apart(found, opened.start_dir)
            for entry in entries:
                _check_sum(entry, found[entry.filename], file)
    except (Compressed, Damaged):
        raise
    except _BROKEN as error:
        raise Damaged(str(error)) from error
    return found


def read(path: pathlib.Path, member: Member) -> bytes:
    """Return the bytes of a member."""
    with path.open("rb") as file:
        file.seek(member.start)
        return file.read(member.size)


def _member(entry: zipfile.ZipInfo, file: io.BufferedReader) -> Member:
    """Return the position of a member; its local header must agree with the directory."""
    if entry.file_size != entry.compress_size:
        raise Damaged(f"{entry.filename} has two sizes")
    file.seek(entry.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != _SIGNATURE or file.read(name) != _encoded(entry):
        raise Damaged(f"{entry.filename} is not at the position that the directory states")
    return Member(entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size)


def _encoded(entry: zipfile.ZipInfo) -> bytes:
    """Return the name as the file encodes it."""
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def _check_apart(found: dict[str, Member], end: int) -> None:
    """Refuse members that overlap each other or the directory of the archive."""
    before = 0
    for name, member in sorted(found.items(), key=lambda item: item[1]):
        if member.start < before:
            raise Damaged(f"{name} overlaps another member")
        before = member.start + member.size
    if before > end:
        raise Damaged("it is truncated")


def _check_sum(entry: zipfile.ZipInfo, member: Member, file: io.BufferedReader) -> None:
    """Refuse a member whose checksum is wrong."""
    total, left = 0, member.size
    file.seek(member.start)
    while left and (chunk := file.read(min(left, _CHUNK))):
        total, left = zlib.crc32(chunk, total), left - len(chunk)
    if left or total != entry.CRC:
        raise Damaged(f"the checksum of {entry.filename} is wrong")
