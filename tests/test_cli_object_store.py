"""`graft adapters` on an object store: what it changes, servers see by themselves."""

import json
from pathlib import Path

import pytest

from server.adapters.store.folder_store import folder_digest
from server.cli import main
from tests.adapters.s3 import s3_service, use
from tests.api.adapter_files import lora_files


def test_the_words_work_on_an_object_store(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "legal"
    folder.mkdir()
    files = lora_files(1)
    (folder / "adapter_config.json").write_bytes(files.config)
    (folder / "adapter_model.safetensors").write_bytes(files.weights)
    digest = folder_digest(folder).digest
    base = ["--model", str(tiny_llama), "--dtype", "float32", "--device", "cpu"]
    with s3_service() as service:
        use(service, monkeypatch)
        url = f"s3://{service.make_bucket('adapters')}/cli"

        def graft(word: str, *rest: str, cache: str = "cache") -> tuple[int, str, str]:
            code = main(["adapters", word, *rest, "--store", url, "--store-cache", str(tmp_path / cache)])
            return code, *capsys.readouterr()

        assert graft("list") == (0, "", f"graft: the store {url} has no adapters\n")
        assert graft("add", "legal", str(folder), *base)[:2] == (0, f"legal {digest[:12]} added\n")
        (shown,) = json.loads(graft("list", "--json")[1])["data"]
        assert (shown["name"], shown["version"], shown["method"]) == ("legal", digest, "lora")
        # From a machine that has not seen it yet, so that it is downloaded.
        code, told, _ = graft("inspect", "legal", "--json", *base, cache="elsewhere")
        assert (code, json.loads(told)["version"]) == (0, digest)
        assert graft("add", "legal", str(folder), "--replace", *base)[:2] == (
            0, f"legal {digest[:12]} is there already\n",
        )  # fmt: skip
        assert graft("remove", "legal") == (0, "legal removed (1 version)\n", "")
        code, _, refusal = graft("remove", "legal")
        assert (code, "The store has no adapter 'legal'" in refusal) == (2, True)
