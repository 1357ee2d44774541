"""Faults of a whole process: it is told to end, it is lost, it is killed in the middle of a change and starts again."""

import io
import itertools
import resource
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import INCOMING_FOLDER
from tests.api.adapter_files import AdapterFiles
from tests.faults.conftest import Faulted, fill_store
from tests.faults.load import ADAPTERS, Case, Load, ask, await_that, right_answers, settled
from tests.faults.processes import NUM_COMPARED, Process, await_status, begin, note_streams
from tests.faults.test_inside import OF_OTHERS, VICTIM, code_of, files_of, version_of

pytestmark = pytest.mark.slow
LONG = [Case(adapter, "The old boat", 400) for adapter in (None, *ADAPTERS)]
ENDLESS = [Case(adapter, "The old boat", 1000) for adapter in (None, *ADAPTERS)]
Start = Callable[..., Process]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A process that outlives its faults, one life after another, on one store."""
    folder = tmp_path_factory.mktemp("world")
    process = Process(fill_store(folder / "store"), folder / "log").start()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def right(world: Process) -> Mapping[Case, str]:
    with world.client() as http:
        return right_answers(http)


@pytest.fixture(scope="module")
def before(world: Process, right: Mapping[Case, str]) -> Mapping[str, int]:
    """The threads and descriptors of a life that has served."""
    with Load(lambda: world.url, right).running():
        pass
    return world.holds()


@pytest.fixture
def faulted(world: Process, right: Mapping[Case, str], before: Mapping[str, int]) -> Faulted:
    """The process under load, over all its lives; afterwards, what is left over in the last one."""

    @contextmanager
    def faulted() -> Iterator[Load]:
        num_killed, num_starts = len(world.killed), len(world.starts_s)
        with Load(lambda: world.url, right).running() as load:
            yield load
        load.killed, load.restarts_s = world.killed[num_killed:], world.starts_s[num_starts:]
        load.left_over = settled(lambda: world.left_over(before))

    return faulted


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started = []

    def start(fault: str = "none", **flags: str) -> Process:
        named = {name.replace("_", "-"): value for name, value in flags.items()}
        process = Process(fill_store(tmp_path / "store"), tmp_path / "log", fault, named)
        started.append(process)
        return process.start()

    yield start
    for process in started:
        process.kill()


def left_in_store(process: Process) -> dict[str, int]:
    """What an ended process can leave."""
    return {"files": len(list((process.store / INCOMING_FOLDER).iterdir()))}


# It is told to end


def test_sigterm_lets_what_runs_finish(start: Start) -> None:
    process = start(drain_timeout="300")
    right = [each.ended().text[:NUM_COMPARED] for each in begin(process, LONG)]
    streams = begin(process, LONG)
    process.send(signal.SIGTERM)
    await_status(process, "/ready", 503)
    with process.client() as http:
        assert http.get("/health").status_code == 200
        assert code_of(http.post("/v1/completions", json={"prompt": "A"})) == (503, "overloaded")
    ends = [each.ended() for each in streams]
    assert [end.code for end in ends] == [None] * len(ends)
    assert [end.text[:NUM_COMPARED] for end in ends] == right
    assert process.end() == 0
    note_streams(streams, left_in_store(process), right)


def test_sigterm_aborts_what_takes_longer_than_the_limit(start: Start) -> None:
    process = start(drain_timeout="1")
    streams = begin(process, ENDLESS)
    process.send(signal.SIGTERM)
    ends = [each.ended() for each in streams]
    assert {end.code for end in ends} == {"overloaded"}, ends
    assert process.end() == 0
    note_streams(streams, left_in_store(process))


def test_a_second_sigterm_hastens(start: Start) -> None:
    process = start(drain_timeout="100")
    streams = begin(process, ENDLESS)
    process.send(signal.SIGTERM)
    await_status(process, "/ready", 503)
    process.send(signal.SIGTERM)
    ends = [each.ended() for each in streams]
    assert {end.code for end in ends} == {"overloaded"}, ends
    assert process.end() == 0
    note_streams(streams, left_in_store(process))


# It is lost


@pytest.mark.parametrize("fault", ["dies", "hangs", "loses its device"])
def test_an_engine_is_lost(start: Start, fault: str) -> None:
    """Its health turns red, every request has its end, and the process ends so that another is started."""
    process = start(fault, step_timeout="5")
    streams = begin(process, ENDLESS)
    process.send(signal.SIGUSR1)
    await_status(process, "/health", 503)
    ends = [each.ended() for each in streams]
    allowed = {"engine_dead", "generation_failed"} if fault == "loses its device" else {"engine_dead"}
    assert {end.code for end in ends} <= allowed, ends
    assert process.end() == 1
    assert "the engine has stopped" in process.said()
    note_streams(streams, left_in_store(process))


# It is killed in the middle of a change, and starts again


def tar_of(files: AdapterFiles) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in ((CONFIG_FILE, files.config), (WEIGHTS_FILE, files.weights)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def killed_while(process: Process, change: Callable[[httpx.Client, int], object], times: int = 12) -> None:
    """Kills it in the middle of a change that goes on and on, and starts it again on the same store."""
    done = itertools.count()
    num_done = 0

    def go_on() -> None:
        nonlocal num_done
        with suppress(httpx.HTTPError), process.client() as http:
            while True:
                change(http, num_done)
                num_done = next(done)

    thread = threading.Thread(target=go_on)
    thread.start()
    await_that(lambda: num_done >= times or not thread.is_alive())
    assert thread.is_alive()
    process.send(signal.SIGKILL)
    process.end()
    thread.join()
    process.start()


def check_whole(process: Process, right: Mapping[Case, str], *also: str) -> None:
    """Every adapter answers as before, nothing half done is left, and on the disk is what is listed."""
    with process.client() as http:
        assert {case: ask(http, case, stream=False).text for case in right} == right
        listed = {each["name"]: set(each["versions"]) for each in http.get("/v1/adapters").json()["data"]}
        assert http.get("/health").status_code == 200
    assert set(ADAPTERS) <= set(listed) <= {*ADAPTERS, *also}
    assert list((process.store / INCOMING_FOLDER).iterdir()) == []
    on_disk = {
        folder.name: {entry.name for entry in folder.iterdir()} - {"current.json"}
        for folder in process.store.iterdir()
        if folder.is_dir() and folder.name != INCOMING_FOLDER
    }
    assert on_disk == listed


def test_it_is_killed_in_the_middle_of_an_upload(world: Process, right: Mapping[Case, str], faulted: Faulted) -> None:
    files = files_of("pirate-lora")
    host, port = world.url.removeprefix("http://").split(":")
    with faulted() as load:
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            content = tar_of(files)
            head = f"PUT /v1/adapters/torn HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content[: len(content) // 2])
            await_that(lambda: any((world.store / INCOMING_FOLDER).glob("*/version")))
            world.send(signal.SIGKILL)
            world.end()
        assert list((world.store / INCOMING_FOLDER).iterdir()) != []
        world.start()
        load.await_right()
    load.check()
    check_whole(world, right)


def test_it_is_killed_in_the_middle_of_replacing(world: Process, right: Mapping[Case, str], faulted: Faulted) -> None:
    contents = [tar_of(files_of(name)) for name in ("pirate-lora", "shout-rslora")]
    with faulted() as load:
        killed_while(world, lambda http, number: http.put("/v1/adapters/changing", content=contents[number % 2]))
        load.await_right()
    load.check()
    check_whole(world, right, "changing")
    with world.client() as http:
        assert ask(http, Case("changing", "The old boat"), stream=False).text
        assert http.delete("/v1/adapters/changing").status_code == 200


def test_it_is_killed_in_the_middle_of_deleting(world: Process, right: Mapping[Case, str], faulted: Faulted) -> None:
    content = tar_of(files_of("pirate-lora"))

    def change(http: httpx.Client, number: int) -> None:
        assert http.put("/v1/adapters/comes-and-goes", content=content).status_code == 201
        assert http.delete("/v1/adapters/comes-and-goes").status_code == 200

    with faulted() as load:
        killed_while(world, change)
        load.await_right()
    load.check()
    check_whole(world, right, "comes-and-goes")


def test_it_is_killed_in_the_middle_of_merging(world: Process, right: Mapping[Case, str], faulted: Faulted) -> None:
    with world.client() as http:
        assert http.put("/v1/adapters/shout", content=tar_of(files_of("shout-rslora"))).status_code == 201

    def change(http: httpx.Client, number: int) -> None:
        adapters = [{"name": "pirate-lora", "weight": 0.1 + number % 7 / 10}, {"name": "shout", "weight": 0.5}]
        order = {"name": "merged", "adapters": adapters, "strategy": "cat", "replace": True}
        assert http.post("/v1/adapters/merge", json=order).status_code in (200, 201)

    with faulted() as load:
        killed_while(world, change, times=4)
        load.await_right()
    load.check()
    check_whole(world, right, "shout", "merged")


def test_it_starts_again_with_an_index_that_is_cut(world: Process, right: Mapping[Case, str], faulted: Faulted) -> None:
    """What cannot be read is left out by name; nothing else is."""
    index = world.store / VICTIM / "current.json"
    with faulted() as load:
        whole = index.read_bytes()
        world.kill()
        index.write_bytes(whole[:30])
        try:
            world.start()
            with world.client() as http:
                names = {each["name"] for each in http.get("/v1/adapters").json()["data"]}
            assert set(ADAPTERS) - names == {VICTIM}
            load.await_refused("adapter_not_found")
            load.await_right(OF_OTHERS)
            assert any(f"{VICTIM} is left out" in line["message"] for line in world.lines())
        finally:
            world.kill()
            index.write_bytes(whole)
            world.start()
        load.await_right()
    load.check(must_refuse={"adapter_not_found"})
    check_whole(world, right, "shout", "merged", "comes-and-goes")


# It goes on


def test_it_is_stopped_for_a_while(world: Process, faulted: Faulted) -> None:
    """As by a machine that is suspended."""
    with faulted() as load:
        world.send(signal.SIGSTOP)
        time.sleep(2)
        world.send(signal.SIGCONT)
        load.await_right()
    load.check()


def test_it_has_no_descriptors_left(world: Process, right: Mapping[Case, str], faulted: Faulted) -> None:
    """New connections wait, and a cold adapter is told to be asked for again; what is connected is served."""
    before = resource.prlimit(world.pid, resource.RLIMIT_NOFILE)
    with faulted() as load, httpx.Client(base_url=world.url, timeout=120) as http:
        assert http.post("/v1/adapters/judge-loreft/unload").status_code == 200
        num_open = len(list(Path(f"/proc/{world.pid}/fd").iterdir()))
        resource.prlimit(world.pid, resource.RLIMIT_NOFILE, (num_open, before[1]))
        host, port = world.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=120) for _ in range(20)]
        try:
            load.await_right([case for case in right if case.adapter != VICTIM])
            assert http.get("/health").status_code == 200
        finally:
            resource.prlimit(world.pid, resource.RLIMIT_NOFILE, before)
            for connection in idle:
                connection.close()
        load.await_right()
    load.check(may_refuse={"store_unreachable"})
    # A try each second, and not one after the other: the loop has other work.
    assert sum("out of system resource" in line["message"] for line in world.lines()) < 1000


def test_its_log_is_json_and_says_nothing_of_prompts(world: Process, right: Mapping[Case, str]) -> None:
    num_before = len(world.lines())
    with world.client() as http:
        headers = {"x-request-id": "trace-1"}
        body = {"prompt": "zxsecretxz", "adapter": "poet-dora", "max_tokens": 3, "temperature": 0}
        assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
    await_that(lambda: any(line.get("request_id") == "trace-1" for line in world.lines()))
    line = next(line for line in world.lines() if line.get("request_id") == "trace-1")
    assert line.items() >= {"status": 200, "outcome": "ok", "level": "info", "method": "POST"}.items()
    assert line["adapter"] == f"poet-dora@{version_of('poet-dora', world.store).name[:12]}"
    assert line["prompt_tokens"] > 0
    assert 1 <= line["output_tokens"] <= 3
    assert line["seconds"] > 0
    assert "zxsecretxz" not in world.said()
    assert not any(text in world.said() for text in right.values())
    assert not any(line["level"] == "error" for line in world.lines()[num_before:])
