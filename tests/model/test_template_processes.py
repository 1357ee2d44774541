"""Templates are rendered as in transformers, and one that does not end, or grows, ends alone."""

import gc
import subprocess
import threading
from collections.abc import Iterator

import pytest

from server.model.template_processes import TemplateFailed, TemplateLimits, TemplateProcesses

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    processes = TemplateProcesses(TemplateLimits(cpu_s=0.2, max_chars=10_000))
    yield processes
    processes.close()


def test_values_come_through(processes: TemplateProcesses) -> None:
    said = processes.render("{{ a.b[0] | upper }}{{ c }}\n{{ c is none }}", {"a": {"b": ["é\ud800\n"]}, "c": None})
    assert said == "É\ud800\nNone\nTrue"


def test_names_are_those_that_are_read_and_not_set(processes: TemplateProcesses) -> None:
    names = processes.variables("{% for m in messages %}{{ m }}{% endfor %}{% set y = 1 %}{{ y }}{{ z | length }}")
    assert names == {"messages", "z"}


@pytest.mark.parametrize(
    ("template", "kind", "words"),
    [
        ("{{ raise_exception('no wizards, please') }}", "TemplateError", "no wizards, please"),
        ("{% if %}", "TemplateSyntaxError", "line 1"),
        ("{{ x.y.z }}", "UndefinedError", "'x' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError", "__class__"),
        ("{{ namespace(__x=1) }}", "SecurityError", "__x"),
        ("{{ messages.append(1) }}", "SecurityError", "unsafe"),
        ("{% include 'secrets' %}", "TypeError", "no loader"),
        ("{{ 1 + 'a' }}", "TypeError", "unsupported operand"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError", "recursion"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError", "memory"),
        ("{{ 'a' | center(10 ** 10) }}", "MemoryError", "memory"),
        ("{% for i in range(9999) %}{{ 'ab' }}{% endfor %}", "OverflowError", "10000 characters"),
        (ENDLESS, "TimeoutError", "0.2 s of the processor"),
        ("{{ 9 ** (9 ** 9) }}", "TimeoutError", "0.2 s of the processor"),
    ],
    ids=lambda value: value[:40],
)
def test_what_a_template_does_wrong_is_told_and_the_next_one_is_rendered(
    processes: TemplateProcesses, template: str, kind: str, words: str
) -> None:
    with pytest.raises(TemplateFailed, match=words.replace("(", r"\(")) as failed:
        processes.render(template, {"messages": []})
    assert failed.value.kind == kind
    assert processes.render("{{ x }}", {"x": 1}) == "1"


def test_what_constants_make_endless_is_ended_where_names_are_asked_for(processes: TemplateProcesses) -> None:
    """jinja2 computes what is constant while it compiles."""
    with pytest.raises(TemplateFailed, match="of the processor"):
        processes.variables("{{ 9 ** (9 ** 9) }}")


def test_many_threads_share_few_processes(processes: TemplateProcesses) -> None:
    said: dict[int, str] = {}

    def render(number: int) -> None:
        said[number] = processes.render("{{ x }}", {"x": number})

    threads = [threading.Thread(target=render, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: str(number) for number in range(20)}


def test_a_process_that_was_killed_while_idle_is_replaced(processes: TemplateProcesses) -> None:
    processes.render("x", {})
    for process in processes._idle:
        process.kill()
        process.wait()
    assert processes.render("{{ x }}", {"x": 2}) == "2"


def test_a_process_that_ran_out_of_memory_is_not_used_again(processes: TemplateProcesses) -> None:
    """Its templates stay compiled in it, and could leave no room for anybody's."""
    processes.render("x", {})
    (process,) = processes._idle
    with pytest.raises(TemplateFailed, match="memory"):
        processes.render("{{ 'a' * 10 ** 10 }}", {})
    assert process.poll() is not None
    assert processes._idle == []
    assert processes.render("{{ x }}", {"x": 3}) == "3"


def test_no_process_and_nothing_open_is_left_behind() -> None:
    kept: list[subprocess.Popen[bytes]] = []
    for ends_by_close in (True, False):
        processes = TemplateProcesses()
        processes.render("x", {})
        kept += processes._idle
        if ends_by_close:
            processes.close()
        del processes
    gc.collect()
    assert [process.poll() is not None and process.stdout.closed for process in kept if process.stdout] == [True, True]


def test_the_process_knows_nothing_of_the_servers_environment(
    processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "sesame")
    fresh = TemplateProcesses()
    fresh.render("x", {})
    with open(f"/proc/{fresh._idle[0].pid}/environ", "rb") as environment:
        assert b"sesame" not in environment.read()
    fresh.close()
