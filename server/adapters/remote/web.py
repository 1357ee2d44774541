"""A folder of a web server as a place: https:// and http://.

Owns where a request may go: no redirect leads out of what the operator allows, and a name leads to no address at which
clouds keep the credentials of their machines. Knows nothing about other places. Sends no credentials; a proxy is that
of the server's environment.

The standard library's client and not fsspec's, which follows redirects by itself.
"""

import http.client
import ipaddress
import ssl
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPMessage
from typing import IO, Any, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit

from server.adapters.format.content import CONTENT_FILES, WEIGHTS_FILE
from server.adapters.remote.address import Address, AllowList
from server.adapters.remote.places import TIMEOUT_S, denied
from server.ground.errors import BadRequest, SourceFailed

_CHUNK_BYTES = 1 << 18
_CLOUD_ADDRESSES = frozenset({ipaddress.ip_address("fd00:ec2::254")})  # beside the link-local ones


class WebPlace:
    """The files of an adapter, each an answer whose body has not been read yet."""

    def __init__(self, address: Address, opener: urllib.request.OpenerDirector, answers: Mapping[str, Any]) -> None:
        self._address = address
        self._opener = opener
        self._answers = answers
        self.sizes: Mapping[str, int | None] = {name: answer.length for name, answer in answers.items()}
        self.revision = _etag(answers[WEIGHTS_FILE]) if WEIGHTS_FILE in answers else None

    @classmethod
    @contextmanager
    def open(cls, address: Address, allowed: AllowList) -> Iterator[Self]:
        opener = urllib.request.build_opener(_Redirects(address, allowed), _Http(allowed), _Https(allowed))
        with ExitStack() as opened:
            answers = {}
            for name in CONTENT_FILES:
                answer = _get(opener, address, name)
                if answer is not None:
                    answers[name] = opened.enter_context(answer)
            yield cls(address, opener, answers)

    def read(self, name: str) -> Iterator[bytes]:
        while chunk := self._answers[name].read1(_CHUNK_BYTES):
            yield chunk

    def has(self, name: str) -> bool:
        answer = _get(self._opener, self._address, name)
        if answer is not None:
            answer.close()
        return answer is not None

    def check_unchanged(self) -> None:
        """A web server names no state that several files have in common."""


def _get(opener: urllib.request.OpenerDirector, address: Address, name: str) -> Any:
    """The answer to a GET of a file; None where there is none."""
    request = urllib.request.Request(f"{address}/{name}", headers={"Accept-Encoding": "identity"})
    try:
        return opener.open(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        with error:
            if error.code in (404, 410):
                return None
            if error.code in (401, 403):
                raise denied(address) from None
            raise SourceFailed(f"{address}/{name} is answered with status {error.code}: mend the source.") from None


def _etag(answer: Any) -> str | None:
    tag: str | None = answer.headers.get("ETag")
    return tag.removeprefix("W/").strip('"') if tag else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, address: Address, allowed: AllowList) -> None:
        self._address = address
        self._allowed = allowed

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        target = urlsplit(newurl)
        try:
            address = Address.parse(target._replace(query="", fragment="").geturl())
        except BadRequest:
            address = None
        if address is None or not self._allowed.allows(address):
            fp.close()
            raise SourceFailed(
                f"{self._address} redirects to {target.scheme}://{target.hostname or ''}, to a place under no prefix "
                f"that --allow-source names: name it there, or mend the source.",
                code="source_not_allowed",
            )
        # A query is the source's own, such as the signature of where its files really lie.
        url = f"{address}?{target.query}" if target.query else str(address)
        return super().redirect_request(req, fp, code, msg, headers, url)


class _Connection(http.client.HTTPConnection):
    """A connection that looks at who has taken it up before it sends anything."""

    allowed: AllowList

    def connect(self) -> None:
        super().connect()
        peer = ipaddress.ip_address(self.sock.getpeername()[0].partition("%")[0])
        address = getattr(peer, "ipv4_mapped", None) or peer
        if (address.is_link_local or address in _CLOUD_ADDRESSES) and not self.allowed.names_host(str(address)):
            self.close()
            raise SourceFailed(
                f"The host {self.host} leads to {address}, an address inside the server's own network, where clouds "
                f"keep credentials: it is not asked.",
                code="source_not_allowed",
            )


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """TLS begins after `_Connection` has looked."""


def _connection(kind: type[_Connection], allowed: AllowList, host: str, /, **options: Any) -> _Connection:
    connection = kind(host, **options)
    connection.allowed = allowed
    return connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, allowed: AllowList) -> None:
        super().__init__()
        self._connection = partial(_connection, _Connection, allowed)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, allowed: AllowList) -> None:
        super().__init__()
        self._connection = partial(_connection, _SecureConnection, allowed, context=ssl.create_default_context())

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)
