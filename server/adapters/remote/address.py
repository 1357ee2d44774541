"""Where an adapter may be fetched from: the addresses of sources, and the prefixes that the operator allows.

Owns the grammar of a source and its comparison with a prefix. Knows nothing about networks, or what lies there.

A source is taken apart before anything is compared or opened, and put together again from its parts. So what is
compared is what is fetched, two spellings of one place are one address, and a prefix ends where a name ends. What
cannot be taken apart in one way only is refused. A refusal never repeats the source, which may hold credentials.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

from server.ground.errors import BadRequest, Forbidden, StartupRefused

SCHEMES = ("hf", "s3", "gs", "az", "https", "http", "file", "memory")
_WEB = {"http": 80, "https": 443}
_MAX_CHARS = 2048
_FIELD = "'source': "
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a bucket, an organisation, a repository
_HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
# What the hub puts before the names of repositories that are no models.
_OTHER_KINDS = frozenset({"models", "datasets", "spaces", "buckets", "kernels", "collections"})


@dataclass(frozen=True, slots=True)
class Address:
    """A source, taken apart. Its text is its normal form."""

    scheme: str
    authority: str  # host and port, bucket or organisation; empty for file, and in a prefix that allows all of them
    segments: tuple[str, ...]  # of the path, not encoded; of hf the first is the repository
    revision: str | None = None  # that was asked for: of hf alone

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address of one adapter. Raises BadRequest."""
        address = cls._parse(text)
        if not address.segments or (not address.authority and address.scheme != "file"):
            raise _invalid(_EXAMPLES[address.scheme])
        return address

    @classmethod
    def _parse(cls, text: str) -> Self:
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        if not separator or scheme not in SCHEMES:
            raise _invalid(f"it must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}")
        _check_characters(text)
        _check_credentials(rest)
        authority, _, path = rest.partition("/")
        segments = _segments(path, is_encoded=scheme in _WEB)
        if scheme == "hf":
            return cls("hf", _organisation(authority), *_repository(segments))
        if "%" in path and scheme not in _WEB:
            raise _invalid("'%' has no place in it: write each character as it is")
        return cls(scheme, _authority(scheme, authority), segments)

    def __str__(self) -> str:
        is_encoded = self.scheme in _WEB
        segments = [quote(segment) for segment in self.segments] if is_encoded else list(self.segments)
        if self.revision is not None:
            segments[0] += f"@{quote(self.revision, safe='')}"
        return f"{self.scheme}://{self.authority}/{'/'.join(segments)}"

    @property
    def path(self) -> Path:
        """Of file alone: the folder of the server's machine."""
        return Path("/", *self.segments)

    def lies_under(self, prefix: "Address") -> bool:
        """Whether a prefix covers this address: same scheme, same authority, and a path that begins with its names."""
        return (
            self.scheme == prefix.scheme
            and prefix.authority in ("", self.authority)
            and self.segments[: len(prefix.segments)] == prefix.segments
        )


class AllowList:
    """The prefixes under which a request may have adapters fetched; with none, every source is refused."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        """Raises StartupRefused for a prefix that is none."""
        self._prefixes = tuple(_prefix(text) for text in prefixes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AllowList) and self._prefixes == other._prefixes

    def __hash__(self) -> int:
        return hash(self._prefixes)

    def check(self, address: Address) -> None:
        """Raises Forbidden for an address under none of the prefixes, whatever is there."""
        if not self._prefixes:
            raise Forbidden(
                "This server fetches no adapters: upload the files, or start it with --allow-source PREFIX, such as "
                "--allow-source hf://my-organisation/.",
                param="source",
                code="source_not_allowed",
            )
        if not self.allows(address):
            raise Forbidden(
                f"{str(address)!r} lies under no prefix that this server may fetch from. Its operator allows one with "
                f"--allow-source {address.scheme}://{address.authority}/...",
                param="source",
                code="source_not_allowed",
            )

    def allows(self, address: Address) -> bool:
        return any(address.lies_under(prefix) for prefix in self._prefixes)

    def allows_path(self, path: Path) -> bool:
        """Whether a file of this machine, its links resolved, lies under a file:// prefix, its links resolved."""
        roots = [prefix.path.resolve() for prefix in self._prefixes if prefix.scheme == "file"]
        return any(path.is_relative_to(root) for root in roots)

    @property
    def schemes(self) -> frozenset[str]:
        return frozenset(prefix.scheme for prefix in self._prefixes)

    def names_host(self, host: str) -> bool:
        """Whether a prefix names this host."""
        return any(prefix.scheme in _WEB and _without_port(prefix.authority) == host for prefix in self._prefixes)


def _prefix(text: str) -> Address:
    try:
        prefix = Address._parse(text)
    except BadRequest as error:
        raise StartupRefused(f"--allow-source: {error.message.removeprefix(_FIELD)}") from error
    if prefix.scheme in _WEB and not prefix.authority:
        raise StartupRefused(f"--allow-source {prefix.scheme}://: name the host, such as https://models.example.org/")
    if prefix.revision is not None:
        raise StartupRefused("--allow-source: a prefix takes no '@revision'; it allows a repository in all of them")
    if prefix.segments and not prefix.authority and prefix.scheme != "file":
        raise StartupRefused(f"--allow-source: a path needs what it is in: {_EXAMPLES[prefix.scheme]}")
    return prefix


_EXAMPLES = {
    "hf": "write hf://ORGANISATION/REPOSITORY, with @REVISION after it to pin one",
    "s3": "write s3://BUCKET/FOLDER",
    "gs": "write gs://BUCKET/FOLDER",
    "az": "write az://CONTAINER/FOLDER",
    "https": "write https://HOST/FOLDER",
    "http": "write http://HOST/FOLDER",
    "file": "write file:///FOLDER, an absolute path of the server's machine",
    "memory": "write memory://NAME/FOLDER",
}


def _check_characters(text: str) -> None:
    if len(text) > _MAX_CHARS:
        raise _invalid(f"it is longer than {_MAX_CHARS} characters")
    if "\\" in text or text != text.strip():
        raise _invalid("a backslash, and space around it, have no place in it")
    if any(unicodedata.category(character)[0] in "CZ" and character != " " for character in text):
        raise _invalid("characters that cannot be seen have no place in it")


def _check_credentials(rest: str) -> None:
    if "@" in rest.partition("/")[0]:
        raise _invalid("credentials have no place in it: the server uses those of its own environment")
    if "?" in rest or "#" in rest:
        raise _invalid("'?' and '#' have no place in it, and neither has a signature: the server signs for itself")


def _segments(path: str, *, is_encoded: bool) -> tuple[str, ...]:
    """The names in a path; one slash at its end means nothing."""
    if is_encoded and _ESCAPE.search(path):
        raise _invalid("after '%' there must be two hex digits")
    names = path.removesuffix("/").split("/") if path else []
    if is_encoded:
        try:
            names = [unquote(name, errors="strict") for name in names]
        except UnicodeDecodeError:
            raise _invalid("what is encoded in it must be UTF-8") from None
    for name in names:
        # Some web servers read "..;" as "..", and decode twice.
        if name in ("", ".", "..") or (is_encoded and re.search(r"[/%;?#]", name)):
            raise _invalid("'//', '.', '..' and encoded separators have no place in it")
        _check_characters(name)
    return tuple(names)


def _organisation(text: str) -> str:
    if text and (not _NAME.fullmatch(text) or text.lower() in _OTHER_KINDS):
        raise _invalid(_EXAMPLES["hf"])
    return text


def _repository(segments: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """The segments of a hub's address without the revision, and the revision."""
    if not segments:
        return (), None
    repository, at, escaped = segments[0].partition("@")
    revision = unquote(escaped)
    folders = segments[1:]
    if not _NAME.fullmatch(repository) or any("@" in name or "%" in name for name in folders):
        raise _invalid(_EXAMPLES["hf"])
    if at and not _REVISION.fullmatch(revision):
        raise _invalid("after '@' name a branch, a tag or a commit; a '/' in it is written %2F")
    return (repository, *folders), revision if at else None


def _authority(scheme: str, text: str) -> str:
    if scheme in _WEB:
        return _host_and_port(scheme, text) if text else ""
    if scheme == "file":
        if text:
            raise _invalid("file:// names no host: three slashes, then an absolute path of the server's machine")
        return ""
    if text and not _NAME.fullmatch(text):
        raise _invalid(_EXAMPLES[scheme])
    return text


def _host_and_port(scheme: str, text: str) -> str:
    """In lower case, without the scheme's own port."""
    host, port = text.lower(), str(_WEB[scheme])
    if (found := re.fullmatch(r"(.*):([0-9]{1,5})", host)) is not None:
        host, port = found.groups()
    if host.startswith("["):
        host = f"[{_ipv6(host.removeprefix('[').removesuffix(']'))}]"
    elif not _HOST.fullmatch(host):
        raise _invalid(f"its host is not one: {_EXAMPLES[scheme]}")
    if not 0 < int(port) < 65536:
        raise _invalid("its port is not one")
    return host if int(port) == _WEB[scheme] else f"{host}:{int(port)}"


def _ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        raise _invalid("its host is not an IPv6 address") from None


def _without_port(authority: str) -> str:
    return re.sub(r":[0-9]+$", "", authority).strip("[]")


def _invalid(what: str) -> BadRequest:
    return BadRequest(f"{_FIELD}{what}.", param="source", code="invalid_source")
