"""Faults of a server in the tests' process, under load: steps, memory, adapters, store, sources, clients, clock.

By real means where there are any (files that are cut, a folder that is moved, a limit of the system); by a seam where
a device would have to break.
"""

import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.adapters import residency
from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.quarantine import MAX_OVERFLOWS
from server.adapters.store.folder_store import INCOMING_FOLDER
from server.engine import choice
from tests.adapters.remote.site import Page, Site
from tests.api.adapter_files import AdapterFiles
from tests.api.conftest import Live
from tests.faults.conftest import Faulted
from tests.faults.load import STORE, Case, Load, ask, await_that, cases_of

pytestmark = pytest.mark.slow
VICTIM = "judge-loreft"  # whose files are damaged
OVERFLOWING = "cat-lora-plus"  # with a huge alpha: one of its linears reads what another has made huge
OF_VICTIM, OF_OTHERS = cases_of(VICTIM), cases_of(None, "pirate-lora", "poet-dora", "news-vera", "robot-ia3")


def files_of(name: str, store: Path = STORE) -> AdapterFiles:
    folder = version_of(name, store)
    return AdapterFiles((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())


def version_of(name: str, store: Path) -> Path:
    return store / name / str(json.loads((store / name / "current.json").read_text())["current"])


def unload(live: Live, name: str) -> None:
    """So that the next request reads its files again."""
    assert live.http.post(f"/v1/adapters/{name}/unload").status_code == 200


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def failing(fault: Exception, times: int, real: Callable[..., Any], at: Callable[..., bool]) -> Callable[..., Any]:
    """In the place of `real`: raises in so many of the calls that `at` is true of."""
    left = [times]

    def call(*arguments: Any, **named: Any) -> Any:
        if left[0] and at(*arguments, **named):
            left[0] -= 1
            raise fault
        return real(*arguments, **named)

    call.left = left  # type: ignore[attr-defined]
    return call


# Steps


def test_a_step_fails(live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = live.server.runner
    with faulted() as load:
        fault = failing(RuntimeError("a fault"), 3, runner.run, lambda batch, *_: len(batch.sequences) > 1)
        monkeypatch.setattr(runner, "run", fault)
        load.await_refused("generation_failed")
        await_that(lambda: fault.left == [0])  # type: ignore[attr-defined]
        load.await_right()
    load.check(must_refuse={"generation_failed"})


def test_steps_run_out_of_memory(live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, before = live.server.runner, live.metric("graft_steps_shed_total")
    with faulted() as load:
        fault = failing(torch.OutOfMemoryError("a fault"), 5, runner.run, lambda batch, *_: batch.num_tokens > 2)
        monkeypatch.setattr(runner, "run", fault)
        await_that(lambda: fault.left == [0])  # type: ignore[attr-defined]
        load.await_right()
    load.check()
    assert live.metric("graft_steps_shed_total") - before == 5


def test_choosing_tokens_runs_out_of_memory(live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulted() as load:
        fault = failing(MemoryError(), 5, choice.sample, lambda logits, rows, *_: len(rows) > 1)
        monkeypatch.setattr(choice, "sample", fault)
        await_that(lambda: fault.left == [0])  # type: ignore[attr-defined]
        load.await_right()
    load.check()


def test_one_request_needs_more_memory_than_there_is(
    live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = live.server.runner
    with faulted() as load:
        whale = "word " * 60
        num_whale = len(live.server.tokenizer.encode(whale))
        error = torch.OutOfMemoryError("a fault")

        def has_whale(batch: Any, *_: Any) -> bool:
            return any(item.sequence.num_prompt_tokens == num_whale for item in batch.sequences)

        monkeypatch.setattr(runner, "run", failing(error, 1000, runner.run, has_whale))
        answer = live.post("/v1/completions", prompt=whale, max_tokens=4)
        assert code_of(answer) == (500, "out_of_memory")
        load.await_right()
    load.check()


# Adapters on the device


def test_an_adapter_overflows(live: Live, faulted: Faulted) -> None:
    good, name = files_of(OVERFLOWING), "huge"
    with faulted() as load:
        case = Case(name, "The old boat")
        assert live.upload(name, good).status_code == 201
        right = ask(live.http, case, stream=False)
        assert right.text
        assert live.upload(name, good.with_config(lora_alpha=1e30), replace="true").status_code == 201
        for number in range(MAX_OVERFLOWS):
            end = ask(live.http, case, stream=number == 0)
            assert end.code == "adapter_overflow", end
            assert f"{name}@" in end.detail
        refused = live.post("/v1/completions", **case.body(stream=False))
        assert code_of(refused) == (424, "adapter_quarantined")
        assert live.http.get(f"/v1/adapters/{name}").json()["quarantined"] is True
        assert live.metric("graft_adapters_quarantined") == 1
        assert live.http.post(f"/v1/adapters/{name}/lift_quarantine").json()["quarantined"] is False
        assert ask(live.http, case, stream=False).code == "adapter_overflow"
        assert live.upload(name, good, replace="true").status_code == 201
        assert ask(live.http, case, stream=False) == right
        load.await_right()
        assert live.http.delete(f"/v1/adapters/{name}").status_code == 200
    load.check()


def test_a_mix_overflows_and_its_portions_are_served(live: Live, faulted: Faulted) -> None:
    with faulted() as load:
        assert live.upload("huge", files_of(OVERFLOWING).with_config(lora_alpha=9e29)).status_code == 201
        mix = [{"name": "huge", "weight": 0.5}, {"name": "poet-dora", "weight": 1.0}]
        codes = [code_of(live.post("/v1/completions", prompt="The", max_tokens=2, adapter=mix))[1] for _ in range(4)]
        assert codes == ["adapter_overflow"] * MAX_OVERFLOWS + ["adapter_quarantined"]
        load.await_right()
        assert live.http.delete("/v1/adapters/huge").status_code == 200
    load.check()


@pytest.mark.parametrize("inline_bytes", [residency.COPIED_INLINE_BYTES, 0])
def test_memory_runs_out_while_an_adapter_is_put_on_the_device(
    live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    """Between two steps, or beside them: an idle adapter makes room, and nobody notices."""
    monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", inline_bytes)
    device = live.server.adapters
    with faulted() as load:
        fault = failing(torch.OutOfMemoryError("a fault"), 1, device.copy, lambda digest: True)
        monkeypatch.setattr(device, "copy", fault)
        unload(live, VICTIM)
        await_that(lambda: fault.left == [0])  # type: ignore[attr-defined]
        load.await_right()
    load.check()


@pytest.mark.parametrize("inline_bytes", [residency.COPIED_INLINE_BYTES, 0])
def test_there_is_no_memory_to_put_an_adapter_on_the_device(
    live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch, inline_bytes: int
) -> None:
    """Its requests are told so; those for adapters that are there go on, and so do its own afterwards."""
    monkeypatch.setattr(residency, "COPIED_INLINE_BYTES", inline_bytes)
    device = live.server.adapters
    digest = live.http.get(f"/v1/adapters/{VICTIM}").json()["version"]
    with faulted() as load:
        with monkeypatch.context() as patch:
            fault = failing(torch.OutOfMemoryError("a fault"), 10**6, device.copy, lambda wanted: wanted == digest)
            patch.setattr(device, "copy", fault)
            unload(live, VICTIM)
            load.await_refused("overloaded", 3)
            load.await_right(OF_OTHERS)
        load.await_right()
    load.check(must_refuse={"overloaded"})


def test_a_disk_hangs_while_an_adapter_is_loaded(live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, goes_on, is_asked = live.server.registry, threading.Event(), threading.Event()
    load_now = registry._load

    def slow(folder: Path, *weight: float) -> Any:
        if VICTIM in str(folder):
            is_asked.set()
            assert goes_on.wait(120)
        return load_now(folder, *weight)

    with faulted() as load:
        monkeypatch.setattr(registry, "_load", slow)
        unload(live, VICTIM)
        await_that(is_asked.is_set)
        try:  # its own requests wait, and all of the load's clients with them in the end
            for case in OF_OTHERS:
                assert ask(live.http, case, stream=False).text == load.right[case]
            assert not goes_on.is_set()
        finally:
            goes_on.set()
        load.await_right()
    load.check()


# The store


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that: what a full disk says, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_the_disk_is_full_in_the_middle_of_an_upload(live: Live, faulted: Faulted) -> None:
    files = files_of("pirate-lora")
    with faulted() as load:
        with full_disk(len(files.weights) // 2):
            assert code_of(live.upload("late", files)) == (507, "disk_full")
            assert code_of(live.upload("pirate-lora", files.with_config(lora_alpha=1), replace="true"))[0] == 507
            load.await_right()
        assert live.http.get("/v1/adapters/late").status_code == 404
        assert live.upload("late", files).status_code == 201
        assert live.http.delete("/v1/adapters/late").status_code == 200
    load.check()


def test_the_disk_is_full_in_the_middle_of_a_merge(live: Live, faulted: Faulted) -> None:
    adapters = [{"name": "pirate-lora", "weight": 0.5}, {"name": "shout", "weight": 0.5}]
    order = {"name": "merged", "adapters": adapters, "strategy": "cat"}
    with faulted() as load:
        assert live.upload("shout", files_of("shout-rslora")).status_code == 201
        with full_disk(4096):
            assert code_of(live.post("/v1/adapters/merge", **order)) == (507, "disk_full")
            load.await_right()
        assert live.http.get("/v1/adapters/merged").status_code == 404
        assert live.post("/v1/adapters/merge", **order).status_code == 201
        for name in ("merged", "shout"):
            assert live.http.delete(f"/v1/adapters/{name}").status_code == 200
    load.check()


def test_the_store_is_gone_and_comes_back(live: Live, faulted: Faulted) -> None:
    """As with a volume that is not mounted any more. What is in memory is served on."""
    away = live.store.with_name("away")
    with faulted() as load:
        unload(live, VICTIM)
        load.await_right()
        os.rename(live.store, away)
        try:
            load.await_right(OF_OTHERS)
            unload(live, VICTIM)
            load.await_refused("store_unreachable")
            answer = live.post("/v1/completions", **OF_VICTIM[0].body(stream=False))
            assert code_of(answer) == (503, "store_unreachable")
            assert "retry-after" in answer.headers
            assert code_of(live.upload("late", files_of("pirate-lora"))) == (500, "store_unwritable")
            assert live.http.get("/health").status_code == 200
            load.await_right(OF_OTHERS)
        finally:
            os.rename(away, live.store)
        load.await_right()
    load.check(must_refuse={"store_unreachable"})


def test_the_store_cannot_be_written(live: Live, faulted: Faulted) -> None:
    work = live.store / INCOMING_FOLDER
    with faulted() as load:
        os.rename(work, live.store / ".work")
        work.write_bytes(b"in the way")
        try:
            assert code_of(live.upload("late", files_of("pirate-lora"))) == (500, "store_unwritable")
            assert code_of(live.http.delete(f"/v1/adapters/{VICTIM}")) == (500, "store_unwritable")
            load.await_right()
        finally:
            work.unlink()
            os.rename(live.store / ".work", work)
    load.check()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1  # of one weight: it can be read as well as before
    path.write_bytes(content)


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("filename", "damage"), [(WEIGHTS_FILE, _cut), (WEIGHTS_FILE, _flip), (CONFIG_FILE, _cut), (CONFIG_FILE, _remove)]
)
def test_files_in_the_store_are_damaged(
    live: Live, faulted: Faulted, filename: str, damage: Callable[[Path], None]
) -> None:
    """Nothing is ever computed from them; an upload of the same content mends them."""
    folder = version_of(VICTIM, live.store)
    with faulted() as load:
        unload(live, VICTIM)
        damage(folder / filename)
        unload(live, VICTIM)
        load.await_refused("adapter_damaged")
        load.await_right(OF_OTHERS)
        assert live.upload(VICTIM, files_of(VICTIM)).status_code in (200, 201)
        load.await_right()
        assert version_of(VICTIM, live.store) == folder
    load.check(must_refuse={"adapter_damaged"})


# Uploads and sources


def test_a_client_leaves_in_the_middle_of_an_upload(live: Live, faulted: Faulted) -> None:
    files = files_of("pirate-lora")
    with faulted() as load:
        for name in ("torn", "pirate-lora"):
            head = f"PUT /v1/adapters/{name} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(files.weights)}\r\n\r\n"
            with live.connect() as connection:
                connection.sendall(head.encode() + files.weights[:5000])
        load.await_right()
        assert live.http.get("/v1/adapters/torn").status_code == 404
    load.check()


def test_an_upload_is_half_a_file(live: Live, faulted: Faulted) -> None:
    files = files_of("pirate-lora")
    half = AdapterFiles(files.config, files.weights[: len(files.weights) // 2])
    with faulted() as load:
        for name in ("torn", "pirate-lora"):
            assert code_of(live.upload(name, half, replace="true")) == (400, "invalid_adapter")
        assert live.http.get("/v1/adapters/torn").status_code == 404
        load.await_right()
    load.check()


def test_a_source_hangs(live: Live, faulted: Faulted, site: Site) -> None:
    gate = threading.Event()
    source = site.put("slow", files_of("pirate-lora"), gate)
    with faulted() as load:
        assert live.post("/v1/adapters", name="far", source=source).status_code == 202
        await_that(lambda: "/slow/adapter_model.safetensors" in site.asked)
        assert code_of(live.post("/v1/completions", prompt="A", adapter="far")) == (503, "adapter_on_its_way")
        load.await_right()
        assert live.http.delete("/v1/adapters/far/fetch").status_code == 200
        gate.set()
    load.check()


def test_a_source_breaks_off(live: Live, faulted: Faulted, site: Site) -> None:
    files = files_of("pirate-lora")
    source = site.put("torn", files)
    site.pages["/torn/adapter_model.safetensors"] = Page(files.weights[:1000], announced=len(files.weights))
    with faulted() as load:
        answer = live.post("/v1/adapters", name="far", source=source, wait=True)
        assert code_of(answer) == (502, "source_failed")
        load.await_right()
        live.http.delete("/v1/adapters/far/fetch")
    load.check()


def test_an_adapter_is_replaced_and_deleted_while_it_is_used(live: Live, faulted: Faulted) -> None:
    pirate, shout = files_of("pirate-lora"), files_of("shout-rslora")
    case = Case("changing", "The old boat", 40)
    with faulted() as load:
        assert live.upload("changing", pirate).status_code == 201
        right = ask(live.http, case, stream=False).text
        with live.http.stream("POST", "/v1/completions", json=case.body(stream=True)) as answer:
            lines = answer.iter_lines()
            told = [next(lines)]
            with httpx.Client(base_url=live.url, timeout=120) as other:
                sent = other.post(
                    "/v1/adapters", data={"name": "changing"}, files=shout.parts(), params={"replace": "true"}
                )
                assert sent.status_code == 201
                assert other.delete("/v1/adapters/changing").status_code == 200
            told += list(lines)
        events = [json.loads(line[6:]) for line in told if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == right
        assert live.post("/v1/completions", **case.body(stream=False)).status_code == 404
        load.await_right()
    load.check()


# Clients


def test_clients_vanish(live: Live, faulted: Faulted) -> None:
    """Running and waiting, streamed and whole: each sequence is aborted, and none goes on to its own end."""
    num_clients, num_tokens = 12, 200

    def num_aborted() -> float:
        return live.metric("graft_sequences_finished_total", finish_reason="abort")

    def num_theirs() -> int:
        flights = tuple(live.server.engine._flights.values())
        return sum(flight.sequence.params.max_tokens == num_tokens for flight in flights)

    before = num_aborted()
    with faulted() as load:
        connections = []
        for number in range(num_clients):
            adapter = ("pirate-lora", "poet-dora", "news-vera")[number % 3]
            body = {"prompt": "The old boat", "max_tokens": num_tokens, "adapter": adapter, "stream": number % 2 == 0}
            connections.append(live.send("/v1/completions", **body, ignore_eos=True))
        await_that(lambda: num_theirs() == num_clients)
        for connection in connections:
            connection.close()
        await_that(lambda: num_aborted() == before + num_clients, lambda: f"{num_aborted()} after {before}")
        load.await_right()
    load.check(may_refuse={"overloaded"})


def test_clients_do_not_read_their_answers(live: Live, faulted: Faulted) -> None:
    """Their answers are larger than all buffers on the way, so that the server cannot send them to their end."""
    # Some MB for each time that it is sent; those beyond the first wait on the connection.
    asked = {"prompt": [*range(5, 245)], "echo": True, "logprobs": 20, "max_tokens": 1, "n": 8, "stream": True}

    def num_stalled() -> int:
        return sum(connection.flow.write_paused for connection in tuple(live.connections))

    with ExitStack() as opened, faulted() as load:
        for num_deaf in (1, 2):
            deaf = opened.enter_context(live.deaf())
            for _ in range(8):
                live.send("/v1/completions", on=deaf, **asked)
            await_that(lambda wanted=num_deaf: num_stalled() >= wanted, lambda: f"{num_stalled()} are stalled")
        load.await_right()
        assert num_stalled() >= 2
    load.check(may_refuse={"overloaded"})


def test_more_ask_than_may_wait(live: Live, faulted: Faulted) -> None:
    with faulted() as load:
        crowd = [threading.Thread(target=_ask_in_a_crowd, args=[live, load]) for _ in range(8)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
        load.await_right()
    load.check(may_refuse={"overloaded"})


def _ask_in_a_crowd(live: Live, load: Load) -> None:
    """Eight at once are more than eight such clients may ever have in the queue."""
    with httpx.Client(base_url=live.url, timeout=120) as http:
        answer = http.post("/v1/completions", json={"prompt": "The", "max_tokens": 4, "n": 8, "temperature": 0})
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert len({choice["text"] for choice in answer.json()["choices"]}) == 1


# Around it


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_the_clock_jumps(live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """Forward by more than every time limit of the server, or back."""
    now = time.time
    with faulted() as load:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + jump_s)
            load.await_right()
            assert live.upload("dated", files_of("pirate-lora")).status_code == 201
            load.await_right()
        assert live.http.delete("/v1/adapters/dated").status_code == 200
    load.check()


def test_the_processes_that_render_templates_are_killed(live: Live, faulted: Faulted) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
    with faulted() as load:
        right = live.post("/v1/chat/completions", **chat).json()["choices"]
        for _ in range(3):
            killed = _kill_children()
            after = [live.post("/v1/chat/completions", **chat) for _ in range(2)]
            assert killed
            assert after[-1].json()["choices"] == right
            assert all(answer.status_code in (200, 400, 500, 503) for answer in after)
        load.await_right()
    load.check()


def _kill_children() -> int:
    """Of this process, as the system kills those for which there is no memory; no engines of other tests' servers."""
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
    pids = [int(pid) for task in children.parents[1].iterdir() for pid in (task / "children").read_text().split()]
    pids = [pid for pid in pids if b"server.apart" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return len(pids)


def test_a_grammar_overflows_the_stack_of_the_process_that_tries_it(live: Live, faulted: Faulted) -> None:
    """That process dies of it; the request is told, and the next grammar has a new one."""
    rules = "\n".join(["start:r0", *(f"r{n}:r{n + 1}" for n in range(2200)), 'r2200:"a"'])

    def ask_with(grammar: str) -> httpx.Response:
        outputs = {"grammar": grammar}
        return live.post("/v1/completions", prompt="A", max_tokens=4, temperature=0, structured_outputs=outputs)

    with faulted() as load:
        assert ask_with('start: "yes"').json()["choices"][0]["text"] == "yes"
        trial: Any = live.server.grammars._trial
        process = trial._process
        assert process.poll() is None
        answer = ask_with(rules)
        assert code_of(answer) == (400, "invalid_grammar")
        assert "nested too deeply" in answer.json()["error"]["message"]
        assert process.wait(120) in (-signal.SIGSEGV, -signal.SIGABRT)
        load.await_right()
        assert ask_with('start: "no"').json()["choices"][0]["text"] == "no"
    load.check()


def test_no_request_leaves_its_prompt_in_the_log(
    live: Live, faulted: Faulted, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "zxsecretxz"
    with caplog.at_level("INFO"), faulted() as load:
        headers = {"x-request-id": "trace-of-a-secret"}
        for body in (
            {"prompt": secret, "adapter": "pirate-lora", "max_tokens": 3},
            {"prompt": secret, "adapter": "nobody", "max_tokens": 3},
            {"prompt": [secret, {"a": secret}], "max_tokens": 3},
        ):
            live.http.post("/v1/completions", json=body, headers=headers)
        await_that(lambda: caplog.text.count("request trace-of-a-secret: POST") == 3)
    assert not any(load.left_over.values())
    assert secret not in caplog.text
    lines = [r for r in caplog.records if getattr(r, "fields", {}).get("request_id") == "trace-of-a-secret"]
    told = [(r.fields["status"], r.fields["outcome"], r.fields["output_tokens"]) for r in lines]  # type: ignore[attr-defined]
    assert told[0][:2] == (200, "ok")
    assert 1 <= told[0][2] <= 3
    assert told[1][:2] == (404, "adapter_not_found")
    assert told[2][0] == 400
    assert re.fullmatch("pirate-lora@[0-9a-f]{12}", lines[0].fields["adapter"])  # type: ignore[attr-defined]
    assert lines[0].fields["prompt_tokens"] > 0  # type: ignore[attr-defined]


def test_a_defect_in_a_load(live: Live, faulted: Faulted, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = live.server.registry
    load_now = registry._load
    with faulted() as load:
        fault = failing(ZeroDivisionError("a defect"), 1, load_now, lambda folder, *_: VICTIM in str(folder))
        monkeypatch.setattr(registry, "_load", fault)
        unload(live, VICTIM)
        load.await_refused("generation_failed")
        load.await_right()
    load.check(must_refuse={"generation_failed"})


def test_the_store_loses_an_index(live: Live, faulted: Faulted) -> None:
    """The server knows its adapters; nothing but a change of this one needs the file."""
    index = live.store / VICTIM / "current.json"
    with faulted() as load:
        whole = index.read_bytes()
        index.write_bytes(whole[:20])
        try:
            unload(live, VICTIM)
            load.await_right()
            answer = live.upload(VICTIM, files_of(VICTIM).with_config(inference_mode=True), replace="true")
            assert answer.status_code == 409
            assert "current.json" in answer.json()["error"]["message"]
        finally:
            index.write_bytes(whole)
    load.check()
