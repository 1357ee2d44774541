"""The files of a batch: what a line may say, and that answers stay whole and single whatever happens to the process."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.cli.batch_files import Answers, Requests, answer_record, is_ok, pending
from server.ground.errors import BadRequest, Conflict, StorageFull


def line(custom_id: object = "a", **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}} | changes


def text_of(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(one) + "\n" for one in lines)


def answered(custom_id: str, status: int = 200) -> dict[str, Any]:
    return answer_record(custom_id, {"status_code": status, "request_id": "r", "body": "é🎉"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def ids_in(out: Path) -> list[str]:
    return [json.loads(one)["custom_id"] for one in out.read_text(encoding="utf-8").splitlines()]


# Requests


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in line().items() if key != name}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('"text"', ["JSON object"]),
        (json.dumps(line())[:-1] + ', "custom_id": "b"}', ['"custom_id" is twice']),
        (json.dumps(line()).replace('"prompt"', '"seed": 1, "seed": 2, "prompt"'), ['"seed" is twice']),
        (json.dumps(without("custom_id")), ["custom_id is missing"]),
        (json.dumps(without("body")), ["body is missing"]),
        (json.dumps(line(7)), ["custom_id is 7"]),
        (json.dumps(line("")), ['custom_id is ""']),
        (json.dumps(line("\ud800")), ["surrogate"]),
        (json.dumps(line("b", method="GET")), ['"GET"', "POST"]),
        (json.dumps(line("b", url="/v1/embeddings")), ["/v1/embeddings", "/v1/chat/completions"]),
        (json.dumps(line("b", body=[])), ["body"]),
        (json.dumps(line("b", body={"prompt": "x", "stream": True})), ["body.stream"]),
        (json.dumps(line("b", prompt="x")), ['"prompt"', "custom_id, method, url, body"]),
        (json.dumps(line("first")), ["line 1", '"first"']),
        ("\x00\ud800", ["not valid JSON"]),
    ],
)
def test_a_bad_line_is_named_with_its_number(path: Path, bad: str, words: list[str]) -> None:
    path.write_bytes((text_of(line("first")) + bad + "\n").encode(errors="surrogatepass"))
    with pytest.raises(BadRequest) as refused:
        Requests(path)
    assert f"{path} line 2: " in refused.value.message
    assert [word for word in words if word not in refused.value.message] == []
    assert len(refused.value.message) < 500


def test_of_many_bad_lines_the_first_ten_are_told(path: Path) -> None:
    path.write_text("x\n" * 12)
    with pytest.raises(BadRequest) as refused:
        Requests(path)
    told = refused.value.message.splitlines()
    assert len(told) == 11
    assert "2 more lines" in told[-1]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_requests_is_refused(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(BadRequest, match="has no requests"):
        Requests(path)


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest, match="is no file"):
        Requests(tmp_path / name)


def test_lines_are_read_as_other_systems_write_them(path: Path) -> None:
    first, second = (json.dumps(line(name), ensure_ascii=False) for name in ("é", "b"))
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\r\n{second}".encode())
    with closing(Requests(path)) as requests:
        assert list(requests.lines) == ["é", "b"]
        assert [requests.request(one)["custom_id"] for one in requests.lines.values()] == ["é", "b"]


def test_a_file_that_changes_while_it_is_answered_is_noticed(path: Path) -> None:
    path.write_text(text_of(line("a"), line("b")))
    with closing(Requests(path)) as requests:
        path.write_text(text_of(line("x"), line("y")))
        with pytest.raises(Conflict, match="line 2 has changed"):
            requests.request(requests.lines["b"])


# Answers


def test_what_has_an_answer_is_not_pending(path: Path, out: Path) -> None:
    path.write_text(text_of(line("a"), line("b"), line("c")))
    with closing(Requests(path)) as requests, closing(Answers(out, requests.lines)) as answers:
        answers.add(answered("b"))
        assert [one.custom_id for one in pending(requests, answers)] == ["a", "c"]


def test_answers_come_into_the_order_of_the_requests(out: Path) -> None:
    with closing(Answers(out, ["a", "b", "c"])) as answers:
        for name in ("c", "a", "b"):
            answers.add(answered(name))
        answers.settle()
        assert ids_in(out) == ["a", "b", "c"]
        assert all(is_ok(json.loads(one)) for one in out.read_text(encoding="utf-8").splitlines())
    assert os.listdir(out.parent) == [out.name]


def test_any_answer_can_be_written(out: Path) -> None:
    with closing(Answers(out, ["a"])) as answers:
        answers.add(answer_record("a", {"status_code": 200, "request_id": "", "body": "\ud800 \u2028"}))
    assert json.loads(out.read_text(encoding="utf-8"))["response"]["body"] == "? \u2028"


def test_an_answer_that_is_forgotten_can_come_again(out: Path) -> None:
    with closing(Answers(out, ["a", "b", "c"])) as answers:
        for name, status in (("a", 503), ("b", 200)):
            answers.add(answered(name, status))
        assert answers.failed == ["a"]
        answers.forget(answers.failed)
        assert ids_in(out) == ["b"]
        answers.add(answered("a"))
        assert ids_in(out) == ["b", "a"]
        assert answers.failed == []


def test_an_answer_that_lost_its_line_feed_stays_a_line_of_its_own(out: Path) -> None:
    out.write_text(text_of(answered("b"), answered("a")).rstrip("\n"))
    with closing(Answers(out, ["a", "b"])) as answers:
        answers.settle()
    assert ids_in(out) == ["a", "b"]


def test_a_file_of_the_users_beside_it_is_left_alone(out: Path) -> None:
    other = out.with_name(f"{out.name}.tmp")
    other.write_text("my notes")
    out.write_text(text_of(answered("b"), answered("a")))
    with closing(Answers(out, ["a", "b"])) as answers:
        answers.settle()
    assert other.read_text() == "my notes"
    assert {file.name for file in out.parent.iterdir()} == {out.name, other.name}


def test_a_file_cut_anywhere_is_mended_when_it_is_opened_again(out: Path) -> None:
    asked = ["a", "ü", "c"]
    with closing(Answers(out, asked)) as answers:
        for name in asked:
            answers.add(answered(name))
    whole = out.read_bytes()
    for cut in range(len(whole) + 1):
        out.write_bytes(whole[:cut])
        with closing(Answers(out, asked)) as answers:
            # The line feed is all that may be missing of an answer.
            num_whole = whole[:cut].count(b"\n") + (whole[cut : cut + 1] == b"\n")
            assert len(answers) == num_whole
            for name in asked[num_whole:]:
                answers.add(answered(name))
        assert ids_in(out) == asked


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("my notes", "line 1 is no answer"),
        (text_of(line("a")).rstrip("\n"), "line 1 is no answer"),
        (text_of(answered("a"), answered("x")), "line 2 answers custom_id .x., which no request has"),
        (text_of(answered("a"), answered("a")), "line 2 answers custom_id .a. a second time"),
        (text_of(answered("a"))[:-9] + "\n" + text_of(answered("b")), "line 1 is no answer"),
    ],
)
def test_a_file_with_other_content_is_refused_and_left_alone(out: Path, content: str, words: str) -> None:
    out.write_text(content)
    with pytest.raises(Conflict, match=words):
        Answers(out, ["a", "b"])
    assert out.read_text() == content


def test_two_at_once_cannot_write_one_file(out: Path) -> None:
    with closing(Answers(out, ["a", "b"])) as answers:
        with pytest.raises(Conflict, match="another graft batch"):
            Answers(out, ["a", "b"])
        answers.add(answered("b"))
        answers.add(answered("a"))
        answers.settle()  # another file has the name now
        with pytest.raises(Conflict, match="another graft batch"):
            Answers(out, ["a", "b"])
    Answers(out, ["a", "b"]).close()


def test_a_link_stays_a_link_and_rights_stay_as_they_are(out: Path, tmp_path: Path) -> None:
    (tmp_path / "real").touch(mode=0o600)
    out.symlink_to(tmp_path / "real")
    with closing(Answers(out, ["a", "b"])) as answers:
        answers.add(answered("b"))
        answers.add(answered("a"))
        answers.settle()
    assert out.is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    assert ids_in(out) == ["a", "b"]


def test_where_nothing_was_answered_no_file_is_left(out: Path) -> None:
    Answers(out, ["a"]).close()
    assert not out.exists()
    out.touch()
    Answers(out, ["a"]).close()
    assert out.exists()


@pytest.mark.parametrize("name", [".", "missing/out.jsonl"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest):
        Answers(tmp_path / name, [])


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel takes a part of a write and refuses the rest, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_whole_answers(out: Path) -> None:
    with closing(Answers(out, ["a", "b"])) as answers:
        answers.add(answered("b"))
        with files_of_at_most(out.stat().st_size + 10), pytest.raises(StorageFull, match="Its 1 answers are whole"):
            answers.add(answered("a"))
        assert ids_in(out) == ["b"]
        answers.add(answered("a"))
        with files_of_at_most(10), pytest.raises(StorageFull):
            answers.settle()
        assert ids_in(out) == ["b", "a"]
        assert os.listdir(out.parent) == [out.name]
        answers.settle()
    assert ids_in(out) == ["a", "b"]
