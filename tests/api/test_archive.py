"""The tar of an adapter's folder: every way in which people pack one, and nothing else."""

import gzip
import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.format.content import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from server.adapters.store.folder_store import Store
from server.api.archive import ArchiveReader, Ignored
from server.ground.errors import BadRequest, TooLarge

CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', b"w" * 1300
FILES = {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}
MAX_BYTES = 1 << 20
SLACK = 1 << 20  # that an archive may be longer than the limit, for its headers


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(
    files: dict[str, bytes] | None = None, *extra: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT, **options: object
) -> bytes:
    """An archive of `files`, with members that have no bytes after them."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form, **options) as archive:  # type: ignore[call-overload]
        for name, data in (FILES if files is None else files).items():
            archive.addfile(member(name, size=len(data)), io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return packed.getvalue()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("archives") / "store", create=True)


def read(store: Store, *chunks: bytes, max_bytes: int = MAX_BYTES) -> tuple[dict[str, bytes], Ignored]:
    """What of an archive is written, and what is left out; nothing of the upload stays."""
    with store.incoming(max_bytes=max_bytes) as incoming:
        with ArchiveReader(incoming, max_bytes) as archive:
            for chunk in chunks:
                archive.write(chunk)
            ignored = archive.finish()
        incoming.digest()
        written = {path.name: path.read_bytes() for path in incoming.folder.iterdir()}
    return written, ignored


def refused(
    store: Store, *chunks: bytes, kind: type[Exception] = BadRequest, says: str, max_bytes: int = MAX_BYTES
) -> None:
    with pytest.raises(kind, match=says):
        read(store, *chunks, max_bytes=max_bytes)
    assert not list((store.root / ".incoming").iterdir())


def in_folder(folder: str, files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    return {f"{folder}{name}": data for name, data in files.items()}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "legal/", "./out/legal/", "x" * 90 + "/" + "y" * 60 + "/"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_folder_is_read_however_it_was_packed(
    store: Store, form: int, folder: str, pack: Callable[[bytes], bytes]
) -> None:
    files = {**FILES, MANIFEST_FILE: b"{}"}
    top = [member(folder.rstrip("/"), tarfile.DIRTYPE)] if folder else []
    written, ignored = read(store, pack(tar(in_folder(folder, files), *top, form=form)))
    assert (written, ignored) == (files, Ignored(0, ()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.booleans())
def test_an_archive_may_arrive_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], is_gzipped: bool
) -> None:
    whole = tar({**FILES, "README.md": b"about"}, pax_headers={"comment": "of git archive"})
    whole = gzip.compress(whole) if is_gzipped else whole
    pieces, at = [], 0
    for size in itertools.chain(sizes, [len(whole)]):
        pieces.append(whole[at : at + size])
        at += size
    written, ignored = read(Store(tmp_path_factory.getbasetemp() / "pieces", create=True), *pieces)
    assert (written, ignored) == (FILES, Ignored(1, ("README.md",)))


def test_what_says_nothing_about_the_answers_is_left_out_and_named(store: Store) -> None:
    extras = ["README.md", ".gitattributes", "tokenizer.json", "sub/notes.txt", "._adapter_model.safetensors", "\x07"]
    _, ignored = read(store, tar(FILES | dict.fromkeys(extras, b"x")))
    assert ignored == Ignored(6, (*extras[:5], "?"))
    _, many = read(store, tar(FILES | {f"{number}.txt": b"" for number in range(500)}))
    assert (many.num_files, len(many.names)) == (500, 50)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "model.safetensors", "new_embeddings.SAFETENSORS", "optimizer.pt", "sub/training_args.bin",
     "a.pkl", "weights.gguf"],
)  # fmt: skip
def test_other_weights_are_refused_by_name(store: Store, name: str) -> None:
    refused(store, tar({**FILES, name: b"x"}), says=f"{name} may hold weights")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (member("link", tarfile.SYMTYPE, linkname="/etc/passwd"), "link is a symbolic link"),
        (member("link", tarfile.LNKTYPE, linkname=CONFIG_FILE), "link is a hard link"),
        (member(CONFIG_FILE, tarfile.SYMTYPE, linkname="/etc/passwd"), "is a symbolic link"),
        (member("null", tarfile.CHRTYPE), "null is a device"),
        (member("disk", tarfile.BLKTYPE), "disk is a device"),
        (member("pipe", tarfile.FIFOTYPE), "pipe is a pipe"),
        (member("holes", tarfile.GNUTYPE_SPARSE), "holes is a sparse file"),
        (member("odd", b"V"), "odd is of the kind"),
        (member("holes", pax_headers={"GNU.sparse.major": "1"}), "sparse"),
        (member("/etc/passwd"), "the path /etc/passwd leads out"),
        (member(f"../{CONFIG_FILE}"), "leads out"),
        (member("a/../../b"), "leads out"),
        (member("x", pax_headers={"path": "../../etc/passwd"}), "leads out"),
        (member("x", pax_headers={"path": "a\0b"}), "zero byte"),
        (member(CONFIG_FILE), "sent twice"),
        (member(f"other/{CONFIG_FILE}"), "more than one adapter"),
        (member("x", pax_headers={"comment": "c" * 100_000}), "an extended header of it has 100"),
    ],
)
def test_what_no_adapter_needs_is_refused(store: Store, extra: tarfile.TarInfo, says: str) -> None:
    refused(store, tar(None, extra), says=says)


def test_a_header_for_all_files_may_not_rename_them(store: Store) -> None:
    refused(store, tar(pax_headers={"path": CONFIG_FILE}), says="one name or size")


@pytest.mark.parametrize(
    "body",
    [b"", b"\x1f", b"PK\x03\x04" + bytes(600), b"--boundary\r\n" + bytes(600), bytes(100), bytes(512), b"x" * 20480],
    ids=["nothing", "a byte", "zip", "form", "less than a block", "one block", "text"],
)
def test_what_is_no_tar_is_refused(store: Store, body: bytes) -> None:
    refused(store, body, says="The archive cannot be taken")


def test_an_empty_archive_has_no_adapter(store: Store) -> None:
    refused(store, tar({}), says=f"has no {CONFIG_FILE}")


def test_an_archive_that_is_cut_short_anywhere_is_refused(store: Store) -> None:
    whole = tar()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # the two blocks that end it
    for num_bytes in range(0, end, 97):
        refused(store, whole[:num_bytes], says="ends in the middle")
    assert read(store, whole[:end])[0] == FILES
    packed = gzip.compress(whole)
    for num_bytes in range(0, len(packed), 7):
        refused(store, packed[:num_bytes], says="ends in the middle")


def test_a_flipped_bit_is_found(store: Store) -> None:
    refused(store, b"A" + tar()[1:], says="no tar, or a broken one")
    packed = bytearray(gzip.compress(tar()))
    packed[-6] ^= 1
    refused(store, bytes(packed), says="compression is broken")


def test_there_is_nothing_after_the_end(store: Store) -> None:
    refused(store, tar() + tar(), says="more after its end")
    refused(store, gzip.compress(tar()) + gzip.compress(b"more"), says="more after the end of its gzip")
    assert read(store, gzip.compress(tar()) + bytes(512))[0] == FILES


@pytest.mark.parametrize("filename", [WEIGHTS_FILE, "README.md"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_an_archive_over_the_limit_is_refused_by_its_headers(
    store: Store, filename: str, pack: Callable[[bytes], bytes]
) -> None:
    files = {CONFIG_FILE: CONFIG, filename: bytes(MAX_BYTES + SLACK + 1)}
    begun = tar(files)[:8192]
    refused(store, pack(begun) if pack is bytes else pack(tar(files)), kind=TooLarge, says=r"--max-upload-bytes")


def test_a_bomb_is_stopped_at_the_limit(store: Store) -> None:
    """10 MB of headers in 20 kB, and of nothing in as much."""
    header = tar({}, member("x"))[:512]
    refused(store, gzip.compress(header * 20_000), says="more than 10000 headers", max_bytes=1 << 30)
    zeros = gzip.compress(bytes(10 << 20))
    refused(store, zeros, kind=TooLarge, says="larger than 1048576 bytes")


def test_a_file_over_its_own_limit_is_refused(store: Store) -> None:
    refused(store, tar({CONFIG_FILE: bytes((1 << 20) + 1)}), kind=TooLarge, says=CONFIG_FILE)
    refused(store, tar({MANIFEST_FILE: bytes((256 << 10) + 1)}), kind=TooLarge, says=MANIFEST_FILE)


def test_a_size_that_is_none_is_refused(store: Store) -> None:
    header = bytearray(tar({}, member("x"))[:512])
    header[124:136] = b"\xff" * 12  # -1 in GNU's binary
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    refused(store, bytes(header), says="a size in it is no number")
    refused(store, tar(None, member("x", pax_headers={"size": "-5"})), says="a size in it is no number")


def test_names_that_are_no_utf_8_do_no_harm(store: Store, tmp_path: Path) -> None:
    written, ignored = read(
        store, tar(FILES | {"\udce9t\udce9.txt": b"x"}, form=tarfile.GNU_FORMAT, errors="surrogateescape")
    )
    assert (written, ignored.num_files) == (FILES, 1)
    assert ignored.names[0].encode()
