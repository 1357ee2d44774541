"""Sources and prefixes: one place has one address, and a prefix allows what it says and nothing that looks like it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.remote.address import Address, AllowList
from server.ground.errors import BadRequest, Forbidden, StartupRefused

ALLOWED = AllowList(
    ["hf://org/", "hf://other/one", "s3://bucket/team", "file:///srv/adapters", "https://Host.Example:443/a%20b/",
     "http://[::1]:8080/x", "memory://box/"]
)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "normal"),
    [
        ("hf://org/repo", "hf://org/repo"),
        ("HF://org/repo@main/sub/folder", "hf://org/repo@main/sub/folder"),
        ("hf://org/repo@refs%2Fpr%2F1", "hf://org/repo@refs%2Fpr%2F1"),
        ("hf://other/one@v1.0", "hf://other/one@v1.0"),
        ("S3://bucket/team/x/", "s3://bucket/team/x"),
        ("s3://bucket/team/an adapter", "s3://bucket/team/an adapter"),
        ("file:///srv/adapters/legal", "file:///srv/adapters/legal"),
        ("HTTPS://HOST.example:443/a%20b/%7ex", "https://host.example/a%20b/~x"),
        ("http://[0:0::1]:08080/x/y", "http://[::1]:8080/x/y"),
        ("memory://box/x", "memory://box/x"),
    ],
)
def test_an_allowed_source_has_one_normal_form(source: str, normal: str) -> None:
    address = Address.parse(source)
    ALLOWED.check(address)
    assert str(address) == normal
    assert Address.parse(normal) == address


@pytest.mark.parametrize(
    "source",
    [
        "hf://orgs/repo", "hf://Org/repo", "hf://other/one-more", "hf://other/two", "s3://bucket/team-evil",
        "s3://bucket/tea", "s3://bucket/Team/x", "s3://Bucket/team/x", "s3://bucket2/team/x", "gs://bucket/team/x",
        "file:///srv/adapters2/x", "file:///srv", "file:///etc/passwd", "https://host.example/a%20c/x",
        "https://host.example:444/a%20b/x", "http://host.example/a%20b/x", "https://host.example.evil/a%20b/x",
        "https://evil.host.example/a%20b/x", "http://127.0.0.1:8080/x", "http://2130706433/x", "http://[::1]/x",
        "http://169.254.169.254/x", "memory://boxes/x",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_prefix_is_not_allowed(source: str) -> None:
    with pytest.raises(Forbidden, match="--allow-source"):
        ALLOWED.check(Address.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "", "legal", "/srv/adapters/legal", "srv", "file:/srv/adapters/x", "ftp://host.example/x", "hf:/org/repo",
        "s3://bucket/team/../x", "s3://bucket/team/./x", "s3://bucket/team//x", "s3://bucket//team/x", "s3://bucket",
        "s3://bucket/", "s3://bucket/team/%2e%2e/x", "s3://bucket/team/x?versionId=1", "s3://bucket/team/x#y",
        "s3://key:secret@bucket/team/x", "s3:///team/x", "s3://bucket/team\\..\\x", "s3://bucket/team/x\n",
        "s3://bucket/team/x\x00", " s3://bucket/team/x", "s3://bucket/team/\u202ex", "s3://bucket/team/\u00a0", "ſ3://b/x",
        "hf://org", "hf://org/", "hf://org/repo@", "hf://org/repo@..", "hf://org/repo@a@b", "hf://org/repo@a/b@c",
        "hf://org/repo@-x", "hf://org/re%70o", "hf://datasets/org/x", "hf://user@org/repo", "hf://org/.repo",
        "hf://org/repo@a%2F..%2Fb", "file://host/srv/adapters/x", "file://localhost/srv/adapters/x",
        "file:///srv/adapters/../x", "file:///srv/adapters/%2e%2e/x", "file:////srv/adapters/x", "file:///",
        "https://user:secret@host.example/a%20b/x", "https://host.example@evil.example/a%20b/x",
        "https://host.example/a%20b/%2e%2e/x", "https://host.example/a%20b/%2fx", "https://host.example/a%20b/%252e/x",
        "https://host.example/a%20b/..;/x", "https://host.example/a%20b/x%", "https://host.example/a%20b/%ff",
        "https://host.example/a%20b/%5c", "https://host.example/a%20b/x?sig=1", "https://host.example./a%20b/x",
        "https://host.example:0/a%20b/x", "https://host.example:99999/a%20b/x", "https://host.example:/a%20b/x",
        "https:///a%20b/x", "https://host_example/x", "https://höst.example/a%20b/x", "http://[::g]/x",
        "http://[::1]x/x", "s3://bucket/team/" + "x" * 3000,
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_no_source(source: str) -> None:
    with pytest.raises(BadRequest) as refused:
        Address.parse(source)
    assert refused.value.param == "source"
    assert "secret" not in refused.value.message
    assert "sig=1" not in refused.value.message


@given(st.text(max_size=40), st.sampled_from(["s3://bucket/team/", "https://host.example/a%20b/", "hf://org/repo/"]))
def test_whatever_follows_a_prefix_stays_under_it(rest: str, prefix: str) -> None:
    try:
        address = Address.parse(prefix + rest)
    except BadRequest:
        return
    assert ALLOWED.allows(address)
    assert Address.parse(str(address)) == address
    assert not {"", ".", ".."} & set(address.segments)


def test_without_a_prefix_nothing_is_allowed_and_the_flag_is_named() -> None:
    with pytest.raises(Forbidden, match="--allow-source PREFIX"):
        AllowList([]).check(Address.parse("hf://org/repo"))


@pytest.mark.parametrize("prefix", ["hf://", "s3://", "file:///"])
def test_a_prefix_may_allow_all_of_a_scheme(prefix: str) -> None:
    scheme = prefix.partition(":")[0]
    sources = {"hf": "hf://any/repo", "s3": "s3://any/x", "file": "file:///any/x"}
    allowed = AllowList([prefix])
    assert [name for name, source in sources.items() if allowed.allows(Address.parse(source))] == [scheme]


@pytest.mark.parametrize(
    "prefix",
    ["hf", "https://", "http:///x", "s3:///team", "hf://org/repo@main", "s3://bucket/../x", "s3://k:secret@b/", "*"],
)
def test_a_prefix_that_is_none_stops_the_start(prefix: str) -> None:
    with pytest.raises(StartupRefused, match="--allow-source") as refused:
        AllowList([prefix])
    assert "secret" not in refused.value.message
