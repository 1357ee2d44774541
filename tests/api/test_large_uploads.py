"""Good uploads of many megabytes: what the server holds of them while they arrive, and what of one that breaks off."""

import io
import json
import os
import socket
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from server.adapters.format.content import CONFIG_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import INCOMING_FOLDER
from server.ground.config import Settings
from tests.api.adapter_files import AdapterFiles
from tests.api.conftest import Live, eventually, serving
from tests.demo_files import BASE

RANK = 512  # the largest that is taken
LAYERS, HIDDEN, VOCABULARY = 4, 256, 2048
# Of the demo's base: what each linear takes and gives.
WIDTHS = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (256, 128), "self_attn.v_proj": (256, 128),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (256, 512), "mlp.up_proj": (256, 512),
    "mlp.down_proj": (512, 256),
}  # fmt: skip
Request = Callable[[str, AdapterFiles], bytes]  # as it goes over the connection
MIB = 1 << 20
MAX_HELD_BYTES = 10 * MIB
LAST_BYTES = 3000  # kept back, so that the server waits for them with all the rest read


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(
        model=str(BASE),
        store=tmp_path_factory.mktemp("large") / "store",
        quantize="none",
        dtype="float32",
        device="cpu",
        store_reserve=0,
    )
    with serving(settings) as live:
        yield live


@pytest.fixture(scope="module")
def files() -> AdapterFiles:
    """A LoRA of rank 512 on all linears, and on the embedding and the head."""
    tensors = {}
    for layer in range(LAYERS):
        for module, (taken, given) in WIDTHS.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.full((RANK, taken), 0.01)
            tensors[f"{key}.lora_B.weight"] = torch.full((given, RANK), 0.01)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.full((RANK, HIDDEN), 0.01)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.full((VOCABULARY, RANK), 0.01)
    embedding = "base_model.model.model.embed_tokens.lora_embedding"
    tensors[f"{embedding}_A"] = torch.full((RANK, VOCABULARY), 0.01)
    tensors[f"{embedding}_B"] = torch.full((HIDDEN, RANK), 0.01)
    targets = ["lm_head", "embed_tokens"] + sorted(module.partition(".")[2] for module in WIDTHS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    return AdapterFiles(json.dumps(config).encode(), save(tensors))


def form(name: str, files: AdapterFiles) -> bytes:
    fields = ((b"name", name.encode()), (b"config", files.config), (b"weights", files.weights))
    parts = (
        b'--b\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (field, content)
        for field, content in fields
    )
    body = b"".join(parts) + b"--b--\r\n"
    head = b"POST /v1/adapters HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    return head + b"host: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def tar(name: str, files: AdapterFiles) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for filename, content in ((CONFIG_FILE, files.config), (WEIGHTS_FILE, files.weights)):
            info = tarfile.TarInfo(filename)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    body = packed.getvalue()
    head = b"PUT /v1/adapters/%b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % name.encode()
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


def num_arrived(live: Live) -> int:
    """Bytes of uploads under way that are on the disk."""
    return sum(path.stat().st_size for path in (live.store / INCOMING_FOLDER).rglob("*") if path.is_file())


@contextmanager
def sent_but_for_the_last(live: Live, request: bytes) -> Iterator[socket.socket]:
    """A connection on which nearly all of a request has been sent and read."""
    with closing(live.connect()) as connection:
        connection.sendall(memoryview(request)[:-LAST_BYTES])
        eventually(lambda: num_arrived(live) > len(request) - 3 * MIB)  # a part of it is on its way to the disk
        yield connection


@pytest.mark.parametrize("made", [form, tar])
def test_a_large_upload_is_never_held_as_a_whole(live: Live, files: AdapterFiles, made: Request) -> None:
    request = made("large", files)
    assert len(request) > 40 * MIB
    tracemalloc.start()
    try:
        with sent_but_for_the_last(live, request) as connection:
            peak_bytes = tracemalloc.get_traced_memory()[1]
            connection.sendall(request[-LAST_BYTES:])
            said = connection.recv(4096)
            assert said.startswith(b"HTTP/1.1 201"), said
    finally:
        tracemalloc.stop()
    assert peak_bytes < MAX_HELD_BYTES < len(request) / 4
    assert live.http.get("/v1/adapters/large").json()["rank"] == RANK
    assert live.http.delete("/v1/adapters/large").status_code == 200


@pytest.mark.parametrize("made", [form, tar])
def test_a_client_that_leaves_in_the_middle_of_a_large_upload_leaves_nothing(
    live: Live, files: AdapterFiles, made: Request
) -> None:
    def num_left() -> float:
        return live.metric("graft_requests_total", status="499")

    def is_any_open() -> bool:
        """Of this server's uploads: other tests of this process have stores of their own."""
        paths = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        opened = [os.readlink(path) for path in paths if path.is_symlink()]
        return any(f"{live.store}/{INCOMING_FOLDER}/" in path for path in opened)

    before, listed = num_left(), live.http.get("/v1/adapters").json()["data"]
    request = made("torn", files)
    with sent_but_for_the_last(live, request):
        assert is_any_open()
    eventually(lambda: num_left() == before + 1)
    eventually(lambda: list((live.store / INCOMING_FOLDER).iterdir()) == [])
    assert not is_any_open()
    assert live.http.get("/v1/adapters/torn").status_code == 404
    assert live.http.get("/v1/adapters").json()["data"] == listed
    assert live.server.registry.check_integrity() == ()
