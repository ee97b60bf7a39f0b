"""The members of a `.pt2` archive, read strictly: there is one way to understand the file, or it is refused.

`torch.export.save` stores members one behind the other, uncompressed, under one folder. Anything else that a ZIP file can say
(two members of one name, bytes that no member covers, compression, a second directory) only serves to show two readers two files.
"""

import json
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from normfuse.errors import UsageError
from normfuse.pt2.problems import Broken, Unsafe

__all__ = ["CONSTANTS", "EXTRA", "INPUTS", "MODEL", "WEIGHTS", "Archive", "not_there", "opened", "parsed"]

MODEL = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
EXTRA = "extra/"
#: What `torch.export.save` writes. Anything else might reach a reader of PyTorch that nobody has looked at.
_MEMBERS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json|model\.pt)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json|model\.pt)|extra/[\w.\- /]+"
    r"|archive_format|archive_version|version|byteorder|\.format_version|\.storage_alignment|\.data/(version|serialization_id)"
)
_END = 22  # bytes of the end record of a ZIP file without a comment
_LOCAL = struct.Struct("<4s5H3I2H")  # header in front of each member
_UNIX_LINK = 0o120000
_DESCRIPTORS = 0x8  # sizes stand behind the member
_UTF8 = 0x800


class Archive:
    """Members by their path below the root folder."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._size = size
        try:
            self._zip = zipfile.ZipFile(stream)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as e:
            raise Broken(f"it is no archive ({e})") from e
        self._members = self._checked(stream)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def names(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int:
        """Bytes of a member."""
        return self._member(name).file_size

    def open(self, name: str) -> IO[bytes]:
        """A member as a stream; reading it to its end checks its checksum."""
        return self._zip.open(self._member(name))

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as stream:
                return stream.read()
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as e:
            raise Broken(f"{name} cannot be read ({e})") from e

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise Broken(f"it has no {name}")
        return self._members[name]

    def _checked(self, stream: IO[bytes]) -> dict[str, zipfile.ZipInfo]:
        self._check_end(stream)
        if "serialized_exported_program.json" in self._zip.namelist():
            raise Unsafe("it is of the format before PyTorch 2.8, which is made of pickles")
        found: dict[str, zipfile.ZipInfo] = {}
        roots, folded, at = set(), set(), 0
        for info in sorted(self._zip.infolist(), key=lambda i: i.header_offset):
            at = self._check_place(stream, info, at)
            root, _, name = info.filename.partition("/")
            roots.add(root)
            if root in ("", ".", "..") or "\\" in info.filename or "\0" in info.orig_filename:
                raise Unsafe(f"it has a member called {info.filename!r}")
            if name.casefold() in folded:
                raise Unsafe(f"it has two members called {name!r}")
            if not _MEMBERS.fullmatch(name) or {"", ".", ".."} & set(name.split("/")):
                raise Unsafe(f"it has a member {name!r}, which a saved program does not need")
            folded.add(name.casefold())
            found[name] = info
        if at != self._zip.start_dir:
            raise Unsafe("there are bytes that belong to no member")
        if len(roots) > 1:
            raise Unsafe(f"its members stand in {len(roots)} folders: {', '.join(sorted(map(repr, roots))[:3])}")
        return found

    def _check_end(self, stream: IO[bytes]) -> None:
        stream.seek(-_END, 2)
        last = stream.read()
        if last[:4] != b"PK\5\6" or last[-2:] != b"\0\0":
            raise Unsafe("something stands behind the archive")

    def _check_place(self, stream: IO[bytes], info: zipfile.ZipInfo, at: int) -> int:
        """The header in front of the member says what the directory says; returns where the member ends."""
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise Unsafe(f"{name!r} is compressed")
        if info.flag_bits & ~(_UTF8 | _DESCRIPTORS):
            raise Unsafe(f"{name!r} is encrypted, or patched")
        if info.external_attr >> 16 & 0o170000 == _UNIX_LINK:
            raise Unsafe(f"{name!r} is a link")
        if info.header_offset != at:
            raise Unsafe(f"there are bytes in front of {name!r} that belong to no member, or to two")
        if info.header_offset + info.file_size > self._size:
            raise Broken(f"{name!r} claims {info.file_size} bytes, the file has {self._size}")
        stream.seek(at)
        header = stream.read(_LOCAL.size)
        if len(header) < _LOCAL.size:
            raise Broken("it ends too early")
        magic, _, flags, method, _, _, crc, stored, size, n_name, n_extra = _LOCAL.unpack(header)
        written = stream.read(n_name)
        same = (info.CRC, info.file_size, info.file_size)
        long = 0xFFFFFFFF in (stored, size)  # zip64: the numbers stand in the extra field, which the directory has too
        if magic != b"PK\3\4" or method or flags != info.flag_bits or written != name.encode("utf-8" if flags & _UTF8 else "cp437"):
            raise Unsafe(f"the header in front of {name!r} says something else than the directory")
        if not flags & _DESCRIPTORS and not long and (crc, stored, size) != same:
            raise Unsafe(f"the header in front of {name!r} says something else than the directory")
        end: int = at + _LOCAL.size + n_name + n_extra + info.file_size
        return end + self._descriptor(stream, end, info) if flags & _DESCRIPTORS else end

    def _descriptor(self, stream: IO[bytes], at: int, info: zipfile.ZipInfo) -> int:
        """Bytes of the record behind a member that repeats its checksum and sizes."""
        stream.seek(at)
        record = stream.read(24)
        for form in ("<4sIII", "<4sIQQ"):
            size = struct.calcsize(form)
            if record[:size] == struct.pack(form, b"PK\7\x08", info.CRC, *(min(info.file_size, 2**32 - 1),) * 2):
                return size
            if len(record) >= size and struct.unpack_from(form, record) == (b"PK\7\x08", info.CRC, info.file_size, info.file_size):
                return size
        raise Unsafe(f"the record behind {info.orig_filename!r} says something else than the directory")


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The archive at `path`.

    Raises:
        UsageError: there is no such file, or it cannot be opened.
        Broken, Unsafe: it is no archive that `torch.export.save` would write.
    """
    if not path.is_file():
        raise not_there(path)
    try:
        stream = path.open("rb")
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    with stream:
        archive = Archive(stream, path.stat().st_size)
        if "byteorder" in archive and archive.read("byteorder") != sys.byteorder.encode():
            raise Broken(f"its numbers are not in the byte order of this machine ({sys.byteorder})")
        yield archive


def not_there(path: Path) -> UsageError:
    """The error that says why there is no file at `path`."""
    return UsageError(f"{path} is no file, but a folder" if path.is_dir() else f"{path} does not exist")


def parsed(text: bytes | str, where: str) -> Any:
    """JSON without a key that stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Unsafe(f"{where} says one thing twice")
        return found

    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as e:
        raise Broken(f"{where} is no UTF-8 text") from e
    except RecursionError as e:
        raise Broken(f"{where} is nested too deeply") from e
    except ValueError as e:
        raise Broken(f"{where} is no JSON: {e}") from e
