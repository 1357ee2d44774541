"""What a file is that should have been another one, known by its first bytes.

Owns the kinds of file that are sent by mistake, or in bad faith, and what to do instead. Knows nothing about who reads
the files.
"""

HEAD_BYTES = 512  # of a file; enough to know it by

PICKLE = (
    "a pickle, which can run code when it is read. Convert it: load the adapter with PEFT and call "
    "save_pretrained(folder, safe_serialization=True), or with AdapterHub's library and call "
    "save_adapter(folder, name, use_safetensors=True)."
)
_CONVERTED = "Send the adapter as PEFT saved it."
_PACKED = "Unpack it, and send the files in it."
_EXCHANGED = "Are config and weights exchanged?"

# How a file begins -> what it is, and the remedy.
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file that it stands for. Run git lfs pull, and send it."),
    (b"PK\x03\x04", f"a zip archive. {_PACKED} If it is a .bin of PyTorch's, it is {PICKLE}"),
    *((b"\x80" + bytes([protocol]), PICKLE) for protocol in range(2, 6)),
    (b"\x1f\x8b", f"a gzip archive. {_PACKED}"),
    (b"BZh", f"a bzip2 archive. {_PACKED}"),
    (b"\xfd7zXZ", f"an xz archive. {_PACKED}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive. {_PACKED}"),
    (b"7z\xbc\xaf", f"a 7z archive. {_PACKED}"),
    (b"\x7fELF", "a program (ELF). Send the adapter's files."),
    (b"GGUF", f"a GGUF file. {_CONVERTED}"),
    (b"\x89HDF", f"an HDF5 file. {_CONVERTED}"),
    (b"\x93NUMPY", f"a NumPy file. {_CONVERTED}"),
    (b"<", "an HTML page, perhaps that of a failed download. Download the file again."),
)
_TAR_MARK = slice(257, 262)


def foreign_kind(head: bytes, *, wants_json: bool) -> str | None:
    """What a file with these first bytes is, and the remedy, to stand behind "is"; None for what is not known.

    `wants_json` tells a config from weights (safetensors). To be asked of a file that cannot be read as what it should
    be: by chance, data may begin with any bytes.
    """
    text = head.lstrip()
    if wants_json and head[8:9] == b"{" and not text.startswith(b"{"):
        return f"a safetensors file. {_EXCHANGED}"
    if not wants_json and text.startswith((b"{", b"[")):
        return f"JSON text. {_EXCHANGED}"
    if head[_TAR_MARK] == b"ustar":
        return f"a tar archive. {_PACKED}"
    if head and not any(head):
        return "full of zeros, as an unfinished download is. Upload it again."
    return next((kind for mark, kind in _KINDS if text.startswith(mark)), None)
