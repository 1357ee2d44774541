"""vLLM's verbs: its bodies and answers, and no file that the operator has not allowed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.api.lora_verbs import readable_folder
from server.ground.config import Settings
from server.ground.config import load as load_settings
from server.ground.errors import Forbidden, StartupRefused
from tests.api.adapter_files import AdapterFiles, lora_files
from tests.api.conftest import Live, serving
from tests.api.test_adapters import text


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the server may read."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="module")
def open_live(settings: Callable[..., Settings], shelf: Path) -> Iterator[Live]:
    with serving(settings(adapter_paths=(shelf,), max_upload_bytes=256 * 1024)) as live:
        yield live


def write(folder: Path, files: AdapterFiles) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(files.config)
    (folder / WEIGHTS_FILE).write_bytes(files.weights)
    return folder


def load(live: Live, **body: object) -> httpx.Response:
    return live.post("/v1/load_lora_adapter", **{key: _plain(value) for key, value in body.items()})


def unload(live: Live, **body: object) -> httpx.Response:
    return live.post("/v1/unload_lora_adapter", **body)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def assert_refused(answer: httpx.Response, status: int, kind: str, words: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, status, kind), answer.text
    assert words in error["message"]


def test_an_adapter_is_loaded_used_and_unloaded_with_vllms_words(open_live: Live, shelf: Path) -> None:
    folder = write(shelf / "sql", lora_files(61))
    loaded = load(open_live, lora_name="sql", lora_path=folder)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert loaded.headers["content-type"].startswith("text/plain")
    assert text(open_live, model="sql") != text(open_live)
    used = open_live.server.registry.stats()
    unloaded = unload(open_live, lora_name="sql", lora_int_id=1)
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert open_live.post("/v1/completions", prompt="Hi", model="sql").status_code == 404
    freed = open_live.server.registry.stats()
    assert freed.host_used_bytes < used.host_used_bytes
    assert freed.device_used_bytes < used.device_used_bytes
    assert (folder / WEIGHTS_FILE).exists(), "the folder is the operator's"


def test_a_name_is_loaded_once_unless_in_place(open_live: Live, shelf: Path) -> None:
    folder = write(shelf / "twice", lora_files(62))
    assert load(open_live, lora_name="twice", lora_path=folder, base_model_name="tiny").status_code == 200
    before = text(open_live, model="twice")
    write(folder, lora_files(63))
    again = load(open_live, lora_name="twice", lora_path=folder)
    assert_refused(again, 400, "InvalidUserInput", "has already been loaded")
    assert text(open_live, model="twice") == before
    assert load(open_live, lora_name="twice", lora_path=folder, load_inplace=True).status_code == 200
    assert text(open_live, model="twice") != before, "nothing of the old one is reused"
    unload(open_live, lora_name="twice")


def test_what_is_missing_is_told_in_vllms_shape(open_live: Live, shelf: Path) -> None:
    for body in ({}, {"lora_name": "a"}, {"lora_path": "/a"}, {"lora_name": "", "lora_path": "/a"}):
        assert_refused(load(open_live, **body), 400, "InvalidUserInput", "Both 'lora_name' and 'lora_path'")
    assert_refused(unload(open_live), 400, "InvalidUserInput", "'lora_name'")
    assert_refused(unload(open_live, lora_name="nobody"), 404, "NotFoundError", "'nobody' cannot be found")
    missing = load(open_live, lora_name="a", lora_path=shelf / "missing")
    assert_refused(missing, 404, "NotFoundError", "No adapter found")
    (shelf / "bare").mkdir()
    (shelf / "bare" / CONFIG_FILE).write_text("{}", encoding="utf-8")
    assert_refused(load(open_live, lora_name="a", lora_path=shelf / "bare"), 400, "InvalidUserInput", WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_name": "Upper"}, "cannot name an adapter"),
        ({"lora_name": "tiny"}, "a name of the base"),
        ({"base_model_name": "other"}, "'base_model_name' is 'other'"),
    ],
)
def test_names_that_cannot_be_are_refused(open_live: Live, shelf: Path, change: dict[str, str], words: str) -> None:
    folder = write(shelf / "named", lora_files(64))
    body = {"lora_name": "named", "lora_path": str(folder)} | change
    assert_refused(load(open_live, **body), 400, "InvalidUserInput", words)


def test_an_adapter_that_is_none_for_this_base_leaves_nothing(open_live: Live, shelf: Path) -> None:
    for seed, files in enumerate((lora_files(65, hidden=32), lora_files(65).with_config(peft_type="NONE"))):
        folder = write(shelf / f"bad{seed}", files)
        assert load(open_live, lora_name="bad", lora_path=folder).status_code == 400
    huge = write(shelf / "huge", lora_files(66))
    (huge / WEIGHTS_FILE).write_bytes(bytes(300 * 1024))
    assert_refused(load(open_live, lora_name="bad", lora_path=huge), 400, "InvalidUserInput", "--max-upload-bytes")
    assert open_live.http.get("/v1/adapters/bad").status_code == 404
    assert list((open_live.store / ".incoming").iterdir()) == []


# Which files may be read


def test_allowed_folders_come_from_the_settings(shelf: Path, tmp_path: Path) -> None:
    assert load_settings({"model": "m"}).adapter_paths == ()
    given = {"model": "m", "adapter_paths": [str(shelf), str(tmp_path)]}
    assert load_settings(given).adapter_paths == (shelf, tmp_path)
    with pytest.raises(StartupRefused, match=r"--adapter-paths.*is no folder"):
        load_settings({"model": "m", "adapter_paths": [str(tmp_path / "missing")]})


def test_without_allowed_folders_nothing_is_read_and_the_answer_says_how(live: Live, tmp_path: Path) -> None:
    folder = write(tmp_path / "sql", lora_files(61))
    assert_refused(load(live, lora_name="sql", lora_path=folder), 403, "ForbiddenError", "--adapter-paths DIR")


def test_a_path_elsewhere_is_refused_alike_whether_it_is_there_or_not(
    open_live: Live, shelf: Path, tmp_path: Path
) -> None:
    there = write(tmp_path / "there", lora_files(67))
    (shelf / "link").symlink_to(there)
    sneaky = [f"{shelf}/../{there.parent.name}/there", f"{shelf}-other", shelf / "link", "/etc", "org/adapter", "."]
    for path in (there, tmp_path / "missing", *sneaky, "\0", f"{shelf}/\0", "~", "x" * 5000, f"/{'x' * 5000}"):
        refused = load(open_live, lora_name="stolen", lora_path=path)
        assert_refused(refused, 403, "ForbiddenError", "--adapter-paths")
        assert "is not the absolute path of a folder that this server may read" in refused.json()["error"]["message"]


def test_a_file_that_is_a_link_out_is_refused_and_one_within_is_not(shelf: Path, tmp_path: Path) -> None:
    out = write(tmp_path / "out", lora_files(68))
    linked = shelf / "linked"
    linked.mkdir()
    (linked / CONFIG_FILE).write_bytes(lora_files(68).config)
    (linked / WEIGHTS_FILE).symlink_to(out / WEIGHTS_FILE)
    with pytest.raises(Forbidden, match="is a link out"):
        readable_folder(str(linked), (shelf,))
    blobs = write(shelf / "blobs", lora_files(68))
    (linked / WEIGHTS_FILE).unlink()
    (linked / WEIGHTS_FILE).symlink_to(blobs / WEIGHTS_FILE)  # as a hub's cache does
    assert readable_folder(str(linked), (tmp_path, shelf)) == linked.resolve()


def test_a_loop_of_links_is_no_folder(shelf: Path) -> None:
    os.symlink(shelf / "loop", shelf / "loop")
    with pytest.raises(Forbidden):
        readable_folder(str(shelf / "loop" / "x"), (shelf,))


def test_the_verbs_ask_for_the_key(strict: Live) -> None:
    for verb in ("load", "unload"):
        assert httpx.post(f"{strict.url}/v1/{verb}_lora_adapter", json={}).status_code == 401
