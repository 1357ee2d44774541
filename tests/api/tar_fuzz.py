"""Tars that are almost those of an adapter: members, headers, links, sizes and names of a good one, changed.

All choices come from the `Random` that is given. Owns what can be wrong with a tar; knows nothing about HTTP.
"""

import functools
import gzip
import io
import tarfile
from contextlib import suppress
from random import Random
from typing import Literal

from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from tests.api.adapter_files import AdapterFiles, lora_files

_BLOCK = 512
_FORMS: tuple[Literal[0, 1, 2], ...] = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_KINDS = (
    tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
    tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"V", b"M", b"\xff", b"Z",
)  # fmt: skip
_PAX = (
    ("path", "../../x"), ("path", CONFIG_FILE), ("path", ""), ("path", "\udcff"), ("linkpath", "/etc/passwd"),
    ("size", "-1"), ("size", "99999999999999999999"), ("size", "0"), ("size", "x"), ("mtime", "nan"), ("uid", "1e9"),
    ("hdrcharset", "BINARY"), ("GNU.sparse.major", "1"), ("GNU.sparse.name", CONFIG_FILE), ("comment", "c" * 70_000),
    ("SCHILY.xattr.user.x", "y"),
)  # fmt: skip
# Where a header has what, and how many bytes of it: POSIX.1-1988.
_FIELDS = {
    "name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "checksum": (148, 8),
    "kind": (156, 1), "link": (157, 100), "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip
_NUMBERS = (
    b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"            ", b"9" * 12, b"\x80" + bytes(10) + b"\x01",
    b"\xff" * 12, b"\x80" + b"\xff" * 11, b"0x10\0", b"1_0\0", b"00000001750\0",
)  # fmt: skip


_ODD_NAMES = (  # of members, and of what links lead to
    CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, "README.md", "adapter_model.bin", "", ".", "..", "/", "/etc/passwd",
    f"../{CONFIG_FILE}", f"a/../../{CONFIG_FILE}", f"other/{CONFIG_FILE}", f"./{WEIGHTS_FILE}", "../other-adapter",
    "a" * 99, "a" * 100, "a" * 300, "a/" * 200, "\udcff\udcfe", "\u202e", "x\ny", "x\x00y", "C:\\x", "current.json",
    "._adapter_config.json", "\x1b[31m", CONFIG_FILE.upper(), f"{CONFIG_FILE}/", f"{CONFIG_FILE}/x",
)  # fmt: skip


def changed_tar(random: Random) -> bytes:
    """A good tar with some changes, or none."""
    members = _members(random)
    for _ in range(random.randint(0, 4)):
        _change_members(random, members)
    packed = bytearray(_packed(random, members))
    for _ in range(random.randint(0, 2)):
        _change_bytes(random, packed)
    return _framed(random, bytes(packed))


Member = tuple[tarfile.TarInfo, bytes]


@functools.cache
def _files(seed: int) -> AdapterFiles:
    return lora_files(seed)


def _members(random: Random) -> list[Member]:
    files = _files(random.randrange(3))
    named = [(CONFIG_FILE, files.config), (WEIGHTS_FILE, files.weights)]
    named += random.choice([[], [], [(MANIFEST_FILE, b"{}")], [("README.md", b"about")]])
    folder = random.choice(["", "", "./", "legal/", "a" * 80 + "/" + "b" * 60 + "/"])
    return [(_info(folder + name, len(content)), content) for name, content in named]


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def _change_members(random: Random, members: list[Member]) -> None:
    """One change of what the tar has."""
    at = random.randrange(len(members))
    info, content = members[at]
    name = random.choice(_ODD_NAMES)
    change = random.randrange(8)
    if change == 0:
        info.name = name
    elif change == 1:
        info.type, info.linkname = random.choice(_KINDS), name
    elif change == 2:
        link = _info(name, random.choice([0, 0, 5]))
        link.type, link.linkname = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), random.choice(_ODD_NAMES)
        members.insert(random.randrange(len(members) + 1), (link, b""))
    elif change == 3:  # a size that is not that of what follows
        info.size = max(0, random.choice([0, 1, len(content) - 1, len(content) + 1, 511, 512, 1 << 20, 8**11 - 1]))
    elif change == 4:
        members[at] = (info, random.choice([b"", content[: len(content) // 2], content + b"x", bytes(len(content))]))
    elif change == 5:
        members.insert(random.randrange(len(members) + 1), (_info(name, len(content)), content))
    elif change == 6:
        info.pax_headers = dict([random.choice(_PAX)])
    elif len(members) > 1:
        del members[at]


def _packed(random: Random, members: list[Member]) -> bytes:
    """Headers as tarfile writes them; a member that it cannot write in this form is left out."""
    packed = io.BytesIO()
    form = random.choice(_FORMS)
    for info, content in members:
        with suppress(ValueError, UnicodeError):
            packed.write(info.tobuf(form, "utf-8", "surrogateescape"))
            packed.write(content + bytes(-len(content) % _BLOCK))
    packed.write(bytes(random.choice([2, 2, 2, 2, 18, 1, 0]) * _BLOCK))
    return packed.getvalue()


def _change_bytes(random: Random, packed: bytearray) -> None:
    """One change of a field of a header, or of anything; most checksums are made right again."""
    headers = [at for at in range(0, len(packed), _BLOCK) if packed[at + 257 : at + 262] == b"ustar"]
    if not headers or random.random() < 0.2:
        at = random.randrange(len(packed) + 1)
        packed[at : at + random.randint(0, 600)] = random.randbytes(random.choice([0, 1, 100, _BLOCK]))
        return
    header = random.choice(headers)
    start, length = _FIELDS[random.choice(list(_FIELDS))]
    odd = [random.choice(_ODD_NAMES).encode("utf-8", "surrogateescape"), random.randbytes(length)]
    said = random.choice([*_NUMBERS, *odd * 4, random.choice(_KINDS)])[:length]
    packed[header + start : header + start + length] = said.ljust(length, b"\0")
    if random.random() < 0.8:
        packed[header + 148 : header + 156] = b" " * 8
        total = sum(packed[header : header + _BLOCK])
        packed[header + 148 : header + 156] = b"%06o\0 " % total


def _framed(random: Random, packed: bytes) -> bytes:
    """As it is sent: whole, compressed, cut short, with more after it, or not a tar at all."""
    how = random.randrange(12)
    if how < 6:
        return packed
    if how < 8:
        return gzip.compress(packed, 1)
    if how == 8:
        return packed[: random.randrange(len(packed) + 1)]
    if how == 9:
        return packed + random.choice([b"x", packed, bytes(_BLOCK), random.randbytes(2000)])
    if how == 10:
        broken = bytearray(gzip.compress(packed, 1))
        broken[random.randrange(len(broken))] ^= 1 << random.randrange(8)
        return bytes(broken[: random.choice([len(broken), len(broken) // 2])])
    return random.choice([b"", b"\x1f\x8b" + random.randbytes(200), bytes(1024), random.randbytes(2000), b"a" * 513])
