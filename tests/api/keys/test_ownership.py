"""Ownership: what belongs to another owner's keys does not exist, whatever is asked of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.ground.config import Settings
from tests.api.adapter_files import lora_files
from tests.api.conftest import eventually, serving
from tests.api.keys.conftest import Tenants
from tests.api.keys.tenants import Tenant, entry, write_keys

PRIVATE, NEVER = "acme-secret", "acme-nobody"
DIGESTS = "0123456789ab"


@pytest.fixture(scope="module")
def private(tenants: Tenants) -> Iterator[dict[str, Any]]:
    """An adapter of acme's, as acme is shown it."""
    answer = tenants["acme"].upload(PRIVATE, lora_files(1))
    assert answer.status_code == 201
    yield answer.json()
    assert tenants["acme"].ask("DELETE", f"/v1/adapters/{PRIVATE}").status_code == 200


def merge_of(name: str) -> dict[str, Any]:
    return {"name": "beta-merge", "adapters": [{"name": name}, {"name": "public-one"}]}


MIX = [{"name": "public-one"}, {"name": PRIVATE, "weight": 0.5}]
QUESTIONS: dict[str, Callable[[Tenant, str], httpx.Response]] = {
    "chat": lambda who, name: who.ask(
        "POST", "/v1/chat/completions", {"adapter": name, "messages": [{"role": "user", "content": "Hi"}]}
    ),
    "adapter": lambda who, name: who.complete(adapter=name),
    "model": lambda who, name: who.complete(model=name),
    "stream": lambda who, name: who.complete(adapter=name, stream=True),
    "version": lambda who, name: who.complete(adapter=f"{name}@{DIGESTS}"),
    "mix": lambda who, name: who.complete(adapter=[{"name": "public-one"}, {"name": name, "weight": 0.5}]),
    "mix of weight 0": lambda who, name: who.complete(adapter=[{"name": "public-one"}, {"name": name, "weight": 0}]),
    "tokenize": lambda who, name: who.ask("POST", "/tokenize", {"model": name, "prompt": "Hi"}),
    "model card": lambda who, name: who.ask("GET", f"/v1/models/{name}"),
    "describe": lambda who, name: who.ask("GET", f"/v1/adapters/{name}"),
    "describe a version": lambda who, name: who.ask("GET", f"/v1/adapters/{name}@{DIGESTS}"),
    "describe no version": lambda who, name: who.ask("GET", f"/v1/adapters/{name}@x"),
    "versions": lambda who, name: who.ask("GET", f"/v1/adapters/{name}/versions"),
    "fetch": lambda who, name: who.ask("GET", f"/v1/adapters/{name}/fetch"),
    "cancel": lambda who, name: who.ask("DELETE", f"/v1/adapters/{name}/fetch"),
    "delete": lambda who, name: who.ask("DELETE", f"/v1/adapters/{name}"),
    "vllm's delete": lambda who, name: who.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}),
    "load": lambda who, name: who.ask("POST", f"/v1/adapters/{name}/load"),
    "unload": lambda who, name: who.ask("POST", f"/v1/adapters/{name}/unload"),
    "roll back": lambda who, name: who.ask("POST", f"/v1/adapters/{name}/rollback"),
    "merge": lambda who, name: who.ask("POST", "/v1/adapters/merge", merge_of(name)),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_anothers_is_answered_as_what_never_was(
    tenants: Tenants, private: dict[str, Any], question: str
) -> None:
    hidden, unknown = (QUESTIONS[question](tenants["beta"], name) for name in (PRIVATE, NEVER))
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text.replace(PRIVATE, NEVER) == unknown.text
    assert hidden.headers.keys() == unknown.headers.keys()


@pytest.mark.parametrize("question", QUESTIONS)
def test_patterns_hide_the_operators_adapters_in_the_same_way(tenants: Tenants, question: str) -> None:
    if "mix" in question or question == "merge":
        assert tenants["globe"].complete(adapter="public-one").status_code == 200
    hidden, unknown = (QUESTIONS[question](tenants["globe"], name) for name in ("hidden-one", "hidden-two"))
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text.replace("hidden-one", "hidden-two") == unknown.text


def test_lists_have_what_a_key_may_use(tenants: Tenants, private: dict[str, Any]) -> None:
    assert tenants["acme"].adapters() == [PRIVATE, "hidden-one", "public-one"]
    assert tenants["acme"].models() == ["tiny", "org/tiny", PRIVATE, "hidden-one", "public-one"]
    assert tenants["acme-ci"].adapters() == [PRIVATE, "public-one"]
    assert tenants["beta"].adapters() == ["hidden-one", "public-one"]
    assert tenants["globe"].adapters() == ["public-one"]
    assert tenants["bare"].models() == ["tiny", "org/tiny"]
    assert tenants["operator"].adapters() == [PRIVATE, "hidden-one", "public-one"]
    page = tenants["beta"].ask("GET", "/v1/adapters", params={"limit": 1}).json()
    assert (page["last_id"], page["has_more"]) == ("hidden-one", True)


def test_keys_of_one_owner_share_what_they_have(tenants: Tenants) -> None:
    assert tenants["acme-ci"].upload("acme-built", lora_files(2)).status_code == 201
    assert tenants["acme"].complete(adapter="acme-built").json()["adapter"]["name"] == "acme-built"
    assert tenants["acme-ci"].upload("acme-built", lora_files(3), replace="true").status_code == 201
    assert len(tenants["acme"].ask("GET", "/v1/adapters/acme-built/versions").json()["data"]) == 2
    assert tenants["acme-ci"].ask("POST", "/v1/adapters/acme-built/rollback").status_code == 200
    assert tenants["acme"].ask("DELETE", "/v1/adapters/acme-built").status_code == 200


UPLOADS: dict[str, Callable[[Tenant, str], httpx.Response]] = {
    "upload": lambda who, name: who.upload(name, lora_files(4)),
    "upload of the same content": lambda who, name: who.upload(name, lora_files(1)),
    "replacement": lambda who, name: who.upload(name, lora_files(4), replace="true"),
    "tar": lambda who, name: who.ask("PUT", f"/v1/adapters/{name}", content=b""),
    "new tar": lambda who, name: who.ask("PUT", f"/v1/adapters/{name}", content=b"", headers={"if-none-match": "*"}),
    "merge": lambda who, name: who.ask(
        "POST", "/v1/adapters/merge", {"name": name, "adapters": [{"name": "public-one"}], "replace": True}
    ),
}


@pytest.mark.parametrize("way", UPLOADS)
def test_a_name_that_is_anothers_cannot_be_taken(tenants: Tenants, private: dict[str, Any], way: str) -> None:
    """Names are the server's: that one is not free cannot be hidden where patterns overlap; whose it is can."""
    refused = UPLOADS[way](tenants["beta"], PRIVATE)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "name_unavailable")
    assert refused.headers["x-should-retry"] == "false"
    assert tenants["acme"].ask("GET", f"/v1/adapters/{PRIVATE}").json()["versions"] == [private["version"]]
    # Outside of a key's patterns a name that is taken and one that is not are refused alike.
    taken, free = (UPLOADS[way](tenants["globe"], name) for name in (PRIVATE, NEVER))
    assert taken.status_code == free.status_code == 409
    assert taken.text.replace(PRIVATE, NEVER) == free.text


def test_the_operators_adapters_can_be_used_and_not_changed(tenants: Tenants) -> None:
    beta = tenants["beta"]
    assert beta.complete(adapter="public-one").status_code == 200
    assert beta.ask("POST", "/v1/adapters/public-one/load").status_code == 200
    for method, verb in (("DELETE", ""), ("POST", "/unload"), ("POST", "/rollback")):
        refused = beta.ask(method, f"/v1/adapters/public-one{verb}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_owner")
    assert beta.upload("public-one", lora_files(5), replace="true").json()["error"]["code"] == "name_unavailable"
    assert beta.adapters() == ["hidden-one", "public-one"]


def test_the_operator_sees_and_changes_all_and_takes_nothing_over(tenants: Tenants) -> None:
    acme, operator = tenants["acme"], tenants["operator"]
    assert acme.upload("acme-lent", lora_files(6)).status_code == 201
    assert operator.upload("acme-lent", lora_files(7), replace="true").status_code == 201
    assert operator.ask("POST", "/v1/adapters/acme-lent/pin").status_code == 200
    assert operator.ask("POST", "/v1/adapters/acme-lent/unpin").status_code == 200
    assert "acme-lent" in acme.adapters()
    assert "acme-lent" not in tenants["beta"].adapters()
    assert acme.ask("DELETE", "/v1/adapters/acme-lent").status_code == 200


def test_a_merge_belongs_to_who_asked_for_it(tenants: Tenants, private: dict[str, Any]) -> None:
    order = {"name": "acme-merge", "adapters": [{"name": PRIVATE}, {"name": "public-one"}]}
    assert tenants["acme"].ask("POST", "/v1/adapters/merge", order).status_code == 201
    assert "acme-merge" in tenants["acme"].adapters()
    assert "acme-merge" not in tenants["beta"].adapters()
    assert tenants["acme"].ask("DELETE", "/v1/adapters/acme-merge").status_code == 200


def test_equal_content_of_two_owners_stays_two_adapters(tenants: Tenants, private: dict[str, Any]) -> None:
    """Its bytes are shared on host and device; names, counts and lives are not."""
    acme, beta = tenants["acme"], tenants["beta"]
    assert acme.complete(adapter=PRIVATE).status_code == 200
    before = acme.ask("GET", f"/v1/adapters/{PRIVATE}").json()
    copied = beta.upload("beta-same", lora_files(1)).json()
    assert copied["version"] == private["version"]
    assert (copied["num_requests"], copied["num_running"], copied["last_used"]) == (0, 0, None)
    freed = beta.ask("POST", "/v1/adapters/beta-same/unload").json()["freed_bytes"]
    assert freed == {"host": 0, "device": 0}
    assert acme.ask("GET", f"/v1/adapters/{PRIVATE}").json()["tiers"] == before["tiers"]
    assert beta.ask("DELETE", "/v1/adapters/beta-same").status_code == 200
    assert acme.complete(adapter=PRIVATE).status_code == 200


def test_a_failure_of_equal_content_names_ones_own_adapter(tenants: Tenants) -> None:
    """The load is shared, and what it failed with is remembered: others are told of it, and not under whose name."""
    acme, beta, operator = (tenants[name] for name in ("acme", "beta", "operator"))
    digest = acme.upload("acme-equal", lora_files(9)).json()["version"]
    assert beta.upload("beta-equal", lora_files(9)).json()["version"] == digest
    assert operator.ask("POST", "/v1/adapters/acme-equal/unload").status_code == 200
    for name in ("acme-equal", "beta-equal"):
        (tenants.live.server.registry.describe(name).folder / "adapter_config.json").write_text("{}")
    answers = [beta.complete(adapter="beta-equal") for _ in range(2)]  # by the engine, and then from memory
    answers.append(beta.ask("GET", "/v1/adapters/beta-equal"))
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (424, "adapter_damaged")
        assert f"beta-equal@{digest[:12]}" in answer.text
        assert "acme" not in answer.text
    for who, name in ((acme, "acme-equal"), (beta, "beta-equal")):
        assert who.ask("DELETE", f"/v1/adapters/{name}").status_code == 200


def test_lorax_479_a_private_source_is_fetched_for_its_own_key_alone(tenants: Tenants, private: dict[str, Any]) -> None:
    """LoRAX 479: what one tenant's credentials had fetched was served to the next from the cache, by its name."""
    ci, beta = tenants["acme-ci"], tenants["beta"]
    source = next(prefix for prefix in _sources(tenants) if prefix.endswith("/acme")) + "/secret"
    order = {"name": "acme-fetched", "source": source, "wait": True}
    assert ci.ask("POST", "/v1/adapters", order).status_code == 201
    assert ci.ask("POST", "/v1/adapters", order).status_code == 200
    # By name, in a request and in a mix.
    for asked in ("acme-fetched", [{"name": "public-one"}, {"name": "acme-fetched"}]):
        assert beta.complete(adapter=asked).status_code == 404
    # By source: under a name of its own, and under the name that has it.
    for name in ("beta-fetched", "acme-fetched"):
        refused = beta.ask("POST", "/v1/adapters", {**order, "name": name})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "source_not_allowed")
    # By digest, which is no secret.
    digest = ci.ask("GET", "/v1/adapters/acme-fetched").json()["version"]
    for name in ("acme-fetched", "public-one", digest):
        assert beta.complete(adapter=f"{name}@{digest}").status_code == 404
    assert beta.adapters() == ["hidden-one", "public-one"]
    assert ci.ask("DELETE", "/v1/adapters/acme-fetched").status_code == 200


def _sources(tenants: Tenants) -> list[str]:
    keys = json.loads(json.dumps(tenants.file.read_text().split()))
    return [word for word in keys if word.startswith("file://")]


def test_a_failed_fetch_is_told_to_its_owner_alone(tenants: Tenants) -> None:
    ci = tenants["acme-ci"]
    source = _sources(tenants)[0] + "/missing"
    assert ci.ask("POST", "/v1/adapters", {"name": "acme-lost", "source": source}).status_code == 202
    eventually(lambda: ci.ask("GET", "/v1/adapters/acme-lost/fetch").json().get("status") == "failed")
    assert "fetch from" in ci.ask("GET", "/v1/adapters/acme-lost/versions").text
    beta = tenants["beta"]
    for path in ("", "/fetch", "/versions"):
        assert source not in beta.ask("GET", f"/v1/adapters/acme-lost{path}").text
    for other in (beta, tenants["acme-else"]):  # the second is of the same owner, and for other names
        assert other.ask("DELETE", "/v1/adapters/acme-lost/fetch").status_code == 404
    assert beta.ask("GET", "/v1/adapters").json()["fetches"] == []
    assert ci.ask("DELETE", "/v1/adapters/acme-lost/fetch").status_code == 200


def test_a_prefix_that_one_owner_sent_is_not_reused_for_another(tenants: Tenants) -> None:
    """The time to a first token would else tell what others have asked."""
    prompt = list(range(5, 250))

    def cached(who: str, **fields: Any) -> int:
        usage = tenants[who].complete(prompt=prompt, max_tokens=1, **fields).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("acme", adapter="public-one") == 0
    assert cached("acme", adapter="public-one") > 0
    assert cached("beta", adapter="public-one") == 0
    # A salt of its own making does not open another owner's.
    for salt in ("key acme ", "acme", "key acme"):
        assert cached("beta", adapter="public-one", cache_salt=salt) == 0
    assert cached("operator", adapter="public-one") == 0


def test_owners_share_prefixes_where_the_operator_says_so(settings: Callable[..., Settings], tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.yaml", entry("acme"), entry("beta"))
    with serving(settings(api_keys=file, share_prefixes=True)) as live:
        prompt = list(range(5, 250))
        for name, is_cached in (("acme", False), ("beta", True)):
            usage = Tenant(live, name).complete(prompt=prompt, max_tokens=1).json()["usage"]
            assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) is is_cached


def test_owners_outlive_a_restart(settings: Callable[..., Settings], tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.yaml", entry("acme", adapters=["*"]), entry("beta", adapters=["*"]))
    kept = settings(api_keys=file, store=tmp_path / "store")
    with serving(kept) as live:
        assert Tenant(live, "acme").upload("mine", lora_files(8)).status_code == 201
    with serving(kept) as live:
        assert Tenant(live, "acme").adapters() == ["mine"]
        assert Tenant(live, "beta").adapters() == []


def test_an_owner_has_what_its_key_allows_in_the_store(settings: Callable[..., Settings], tmp_path: Path) -> None:
    size = lora_files(1).num_bytes
    file = write_keys(
        tmp_path / "keys.yaml",
        entry("count", adapters=["*"], limits={"adapters": 2}),
        entry("bytes", adapters=["*"], limits={"storage_bytes": 2 * size}),
    )
    with serving(settings(api_keys=file)) as live:
        for name in ("count", "bytes"):
            who = Tenant(live, name)
            assert [who.upload(f"{name}-{n}", lora_files(n)).status_code for n in (1, 2, 3)] == [201, 201, 507]
            refused = who.upload(f"{name}-4", lora_files(4))
            assert refused.json()["error"]["code"] == "quota_exceeded"
            assert refused.headers["x-should-retry"] == "false"
        assert Tenant(live, "count").upload("count-1", lora_files(4), replace="true").status_code == 201
        assert Tenant(live, "bytes").upload("bytes-1", lora_files(4), replace="true").status_code == 507
        assert Tenant(live, "bytes").ask("DELETE", "/v1/adapters/bytes-1").status_code == 200
        assert Tenant(live, "bytes").upload("bytes-4", lora_files(4)).status_code == 201
        rubbish = {"content": b"x" * (2 * size + 2**17), "headers": {"content-type": "multipart/form-data; boundary=b"}}
        announced = Tenant(live, "bytes").ask("POST", "/v1/adapters", **rubbish)
        assert announced.json()["error"]["code"] == "quota_exceeded", "before the form is looked at"


def test_a_refused_unload_frees_no_mix(tenants: Tenants) -> None:
    acme = tenants["acme"]
    mix = [{"name": "public-one", "weight": 0.5}, {"name": "hidden-one", "weight": 0.5}]
    assert acme.complete(adapter=mix).status_code == 200
    mixes = tenants.live.server.registry._books.catalog.mixes
    before = list(mixes)
    assert before
    assert acme.ask("POST", "/v1/adapters/public-one/unload").status_code == 403
    assert list(mixes) == before
