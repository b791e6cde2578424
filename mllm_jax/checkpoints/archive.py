"""Uncompressed zip files, as `torch.save` and `np.savez` write them, checked byte for byte."""

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
_BROKEN = (  # what zipfile raises of a damaged zip
    zipfile.BadZipFile, struct.error, OSError, EOFError, RuntimeError, UnicodeError, ValueError,
)  # fmt: skip


class Member(NamedTuple):
    """Where the bytes of a member lie in the archive.

    Attributes:
        start: of its first byte, in the file. size: in bytes.
    """

    start: int
    size: int


class Compressed(ValueError):
    """The archive is a zip, but its members are not stored as they are."""


class Damaged(ValueError):
    """The archive is no zip, or not the one that was written."""


def members(path: pathlib.Path) -> dict[str, Member]:
    """The members of an archive, by name, of which every byte is what was written.

    Both headers of a member must agree, no two members may share a byte, and checksums are
    compared: a flipped offset gives an error and not another tensor.

    Raises:
        Damaged: truncated, altered, or no zip.
        Compressed: it would have to be unpacked, to a size that nobody knows.
    """
    try:
        with zipfile.ZipFile(path) as opened, path.open("rb") as file:
            entries = opened.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Compressed
            found = {entry.filename: _member(entry, file) for entry in entries}
            if len(found) < len(entries):
                raise Damaged("a name is there twice")
            _check_apart(found, opened.start_dir)
            for entry in entries:
                _check_sum(entry, found[entry.filename], file)
    except (Compressed, Damaged):
        raise
    except _BROKEN as error:
        raise Damaged(str(error)) from error
    return found


def read(path: pathlib.Path, member: Member) -> bytes:
    """The bytes of a member."""
    with path.open("rb") as file:
        file.seek(member.start)
        return file.read(member.size)


def _member(entry: zipfile.ZipInfo, file: io.BufferedReader) -> Member:
    if entry.file_size != entry.compress_size:
        raise Damaged(f"{entry.filename} has two sizes")
    file.seek(entry.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != _SIGNATURE or file.read(name) != _encoded(entry):
        raise Damaged(f"{entry.filename} is not where it should be")
    return Member(entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size)


def _encoded(entry: zipfile.ZipInfo) -> bytes:
    """The name as it stands in the file."""
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")


def _check_apart(found: dict[str, Member], end: int) -> None:
    """Members follow each other, and lie before the directory that names them."""
    before = 0
    for name, member in sorted(found.items(), key=lambda item: item[1]):
        if member.start < before:
            raise Damaged(f"{name} overlaps another member")
        before = member.start + member.size
    if before > end:
        raise Damaged("it is cut short")


def _check_sum(entry: zipfile.ZipInfo, member: Member, file: io.BufferedReader) -> None:
    total, left = 0, member.size
    file.seek(member.start)
    while left and (chunk := file.read(min(left, _CHUNK))):
        total, left = zlib.crc32(chunk, total), left - len(chunk)
    if left or total != entry.CRC:
        raise Damaged(f"{entry.filename} does not have the bytes that were written")
