"""Adapters that no server should accept, by what is wrong with them: for each the files, and how the refusal reads.

All are made from one good adapter by one change, so that this change is what the refusal has to name.
"""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from tests.adapters.format.test_checkpoint import packed
from tests.api.adapter_files import HIDDEN, KV_WIDTH, RANK, AdapterFiles, lora_files

GOOD = lora_files(41)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
MAX_HEADER_BYTES = 8 << 20
CODE_FILE = "/tmp/bad-upload-was-here"  # what would show that code in an adapter has run


@dataclass(frozen=True)
class Bad:
    make: Callable[[], AdapterFiles]
    says: str  # a regular expression that the message has
    status: int = 400
    param: str | None = None
    is_bomb: bool = False  # made to take memory or time


# One change to the good adapter


def config(says: str, **changes: Any) -> Bad:
    """Fields of the config are set."""
    return Bad(lambda: GOOD.with_config(**changes), says)


def without(field: str, says: str) -> Bad:
    fields = {name: value for name, value in json.loads(GOOD.config).items() if name != field}
    return Bad(lambda: replace(GOOD, config=json.dumps(fields).encode()), says)


def config_file(says: str, text: bytes | Callable[[], bytes], **more: Any) -> Bad:
    """The config is another file."""
    return Bad(lambda: replace(GOOD, config=text if isinstance(text, bytes) else text()), says, **more)


def weights_file(says: str, data: bytes | Callable[[], bytes], **more: Any) -> Bad:
    """The weights are another file."""
    return Bad(lambda: replace(GOOD, weights=data if isinstance(data, bytes) else data()), says, **more)


def tensors(says: str, changes: Mapping[str, torch.Tensor | None], **fields: Any) -> Bad:
    """Tensors are set (None: taken out), and fields of the config."""

    def make() -> AdapterFiles:
        changed = {key: tensor for key, tensor in (load(GOOD.weights) | dict(changes)).items() if tensor is not None}
        return replace(GOOD.with_config(**fields), weights=save(changed))

    return Bad(make, says)


def renamed(says: str, **names: str) -> Bad:
    """The tensors A and B of one module get other keys."""

    def make() -> AdapterFiles:
        saved = load(GOOD.weights)
        for role, name in names.items():
            saved[name] = saved.pop({"a": A, "b": B}[role])
        return replace(GOOD, weights=save(saved))

    return Bad(make, says)


def header(says: str, change: Callable[[dict[str, Any]], object], data: bytes = b"") -> Bad:
    """The header is changed, and `data` appended to the file."""

    def make() -> AdapterFiles:
        parsed, tail = unpacked(GOOD.weights)
        change(parsed)
        return replace(GOOD, weights=packed(parsed, tail + data))

    return Bad(make, says)


def entry(says: str, **changes: Any) -> Bad:
    """The header's entry of one tensor is changed."""
    return header(says, lambda parsed: parsed[A].update(changes))


def offsets(says: str, key: str, change: Callable[[int, int], list[Any]]) -> Bad:
    return header(says, lambda parsed: parsed[key].update(data_offsets=change(*parsed[key]["data_offsets"])))


def unpacked(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    end = 8 + int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:end]), weights[end:]


DATA_BYTES = len(unpacked(GOOD.weights)[1])


def last_key() -> str:
    """The tensor whose data ends the file."""
    parsed, _ = unpacked(GOOD.weights)
    return max(parsed, key=lambda key: parsed[key]["data_offsets"][1])


# Files of other kinds


class RunsCode:
    """What a pickle of it would do when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import bad_upload_was_here",))


def zipped(num_bytes: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../adapter_model.safetensors", GOOD.weights + bytes(num_bytes))
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../adapter_model.safetensors"))
    return file.getvalue()


def torch_saved() -> bytes:
    file = io.BytesIO()
    torch.save(load(GOOD.weights), file)
    return file.getvalue()


def numpy_saved() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(100))
    return file.getvalue()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 8404992\n"
HTML = b"\n<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not here</body></html>\n"
DEEP = b'{"a": ' + b"[" * 100_000

FILES: dict[str, Bad] = {
    "empty-weights": weights_file("truncated: it has 0 bytes", b""),
    "truncated-in-the-length": weights_file("truncated: it has 5 bytes", GOOD.weights[:5]),
    "truncated-in-the-header": weights_file("truncated: it has 100 bytes, and its header", GOOD.weights[:100]),
    "truncated-in-the-data": weights_file(
        r"has \d+ bytes, its header describes \d+\. Upload it again", GOOD.weights[:-9]
    ),
    "noise": weights_file("its header alone would have 1\\d{18}", b"\x11\x22\x33\x44\x55\x66\x77\x17" * 64),
    "zeros": weights_file("full of zeros", bytes(4096)),
    "pickle-renamed": weights_file("is a pickle, which can run code", lambda: pickle.dumps(RunsCode())),
    "torch-bin-renamed": weights_file(r"zip archive.*\.bin of PyTorch's.*safe_serialization=True", torch_saved),
    "zip-renamed": weights_file("is a zip archive. Unpack it", zipped),
    "zip-bomb": weights_file("model.safetensors is a zip archive", lambda: zipped(64 << 20), is_bomb=True),
    "gzip-renamed": weights_file("is a gzip archive", gzip.compress(GOOD.weights, mtime=0)),
    "tar-renamed": weights_file("is a tar archive", tarred),
    "program": weights_file(r"is a program \(ELF\)", b"\x7fELF\x02\x01\x01" + bytes(57) + b"\x90" * 64),
    "gguf": weights_file("is a GGUF file", b"GGUF\x03\0\0\0" + bytes(64)),
    "hdf5": weights_file("is an HDF5 file", b"\x89HDF\r\n\x1a\n" + b"\x01" * 64),
    "numpy": weights_file("is a NumPy file", numpy_saved),
    "html-page": weights_file("safetensors is an HTML page, perhaps that of a failed download", HTML),
    "git-lfs-pointer": weights_file("safetensors is a git-lfs pointer.*git lfs pull", LFS_POINTER),
    "json-for-weights": weights_file("JSON text. Are config and weights exchanged", GOOD.config),
    "safetensors-for-config": config_file("is a safetensors file. Are config", GOOD.weights),
    "git-lfs-pointer-for-config": config_file("config.json is a git-lfs pointer", LFS_POINTER),
    "html-page-for-config": config_file("config.json is an HTML page", HTML),
    "empty-config": config_file(r"config.json is not valid JSON: Expecting value: line 1 column 1 [(]", b""),
}

HEADERS: dict[str, Bad] = {
    "header-length-zero": weights_file("has an empty header", bytes(8) + b"data"),
    "header-longer-than-the-file": weights_file(
        "its header alone would have 999999[.]", (999_999).to_bytes(8, "little") + GOOD.weights[8:]
    ),
    "header-length-2-to-63": weights_file(
        "would have 9223372036854775808", (1 << 63).to_bytes(8, "little") + GOOD.weights[8:]
    ),
    "header-over-the-limit": weights_file(
        f"header of {MAX_HEADER_BYTES + 3} bytes; the limit is {MAX_HEADER_BYTES}",
        lambda: packed(b" " * (MAX_HEADER_BYTES + 1) + b"{}"),
        is_bomb=True,
    ),
    "header-of-empty-lists": weights_file(
        r"describes more than the 65536 tensors .* has 5592\d\d\d of the signs",
        lambda: packed(b'{"a":[' + b"[]," * ((MAX_HEADER_BYTES - 16) // 3) + b"[]]}"),
        is_bomb=True,
    ),
    "header-of-many-names": weights_file(
        r"describes more than the 65536 tensors .* has 11\d\d\d\d\d of the signs",
        lambda: packed(b"{" + b",".join(b'"%d":0' % n for n in range(580_000)) + b"}"),
        is_bomb=True,
    ),
    "header-of-too-many-tensors": weights_file(
        "has 65537 tensors; the limit is 65536",
        lambda: packed({f"{n}": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]} for n in range(65_537)}),
        is_bomb=True,
    ),
    "header-nested-without-end": weights_file("The header of .* is nested too deep", packed(DEEP), is_bomb=True),
    "header-not-json": weights_file(
        "The header of adapter_model.safetensors is not valid JSON: Expecting", packed(b"{,}")
    ),
    "header-not-utf-8": weights_file("The header of .* is not in UTF-8", packed(b'{"\xff": 1}')),
    "header-a-list": weights_file("The header of .* must be a JSON object", packed([1, 2])),
    "header-of-nan": weights_file("The header of .* NaN is not a JSON number", packed(b'{"a": NaN}')),
    "header-of-a-huge-number": weights_file(
        r"Exceeds the limit .* value has 5000 digits\.$", packed(b'{"a": ' + b"9" * 5000 + b"}")
    ),
    "header-of-one-name-twice": weights_file("the name 'a' occurs twice", packed(b'{"a": 1, "a": 2}')),
    "metadata-not-text": header(
        "__metadata__ .* must be an object of texts", lambda h: h.update(__metadata__={"n": 1})
    ),
    "metadata-a-list": header("__metadata__", lambda h: h.update(__metadata__=["pt"])),
    "entry-not-an-object": header("lora_A.weight: the header must give exactly", lambda h: h.update({A: [4, 64]})),
    "entry-without-offsets": header(
        "x: the header must give exactly", lambda h: h.update(x={"dtype": "F32", "shape": [1]})
    ),
    "entry-with-more": entry("q_proj.lora_A.weight: the header must give exactly dtype, shape", strides=[64, 1]),
    "offsets-reversed": offsets(r"q_proj.lora_A.weight: data_offsets span -1024 bytes", A, lambda b, e: [e, b]),
    "offsets-overlapping": offsets("lora_.*: its data overlaps another", B, lambda b, e: [b - 4, e - 4]),
    "offsets-twice": header("twin: its data overlaps another tensor's", lambda h: h.update(twin=dict(h[A]))),
    "offsets-with-a-gap": offsets("its data leaves a gap before it", last_key(), lambda b, e: [b + 4, e + 4]),
    "offsets-past-the-end": header(
        r"has 8296 bytes, its header describes 8300",
        lambda h: h.update(z={"dtype": "F32", "shape": [1], "data_offsets": [DATA_BYTES, DATA_BYTES + 4]}),
    ),
    "offsets-negative": offsets(
        "lora_B.weight: data_offsets must be two whole numbers", B, lambda b, e: [-4, e - b - 4]
    ),
    "offsets-of-floats": offsets("lora_A.weight: data_offsets must be two whole", A, lambda b, e: [float(b), float(e)]),
    "offsets-beyond-64-bit": offsets(
        "A.weight: data_offsets must be two", A, lambda b, e: [b + (1 << 64), e + (1 << 64)]
    ),
    "bytes-after-the-data": header(r"has \d+ bytes, its header describes \d+", lambda h: None, data=b"PK\x03\x04more"),
    "type-unknown": entry("is of type 'F4'; the known types are F32, F16, BF16", dtype="F4"),
    "type-a-list": entry(r"is of type \['F32'\]", dtype=["F32"]),
    "type-float8": entry("is of type 'F8_E4M3'", dtype="F8_E4M3", shape=[4 * RANK, HIDDEN]),
    "type-float64": entry("is of type 'F64'.* Save it as F32, F16, BF16", dtype="F64", shape=[RANK, HIDDEN // 2]),
    "type-complex": entry("is of type 'C64'", dtype="C64", shape=[RANK, HIDDEN // 2]),
    "type-bool": entry("is of type 'BOOL'", dtype="BOOL", shape=[4 * RANK, HIDDEN]),
    "type-whole-numbers": entry("A.weight is of type I32; save it as", dtype="I32"),
    "shape-beyond-memory": entry(
        "data_offsets span 1024 bytes, its shape and type need 4503599627370496", shape=[1 << 50]
    ),
    "shape-that-overflows-64-bit": entry("its shape and type need 67692131204121456532", shape=[1 << 52] * 8),
    "shape-negative": entry("A.weight: shape must be at most 8 whole numbers", shape=[-RANK, -HIDDEN]),
    "shape-of-floats": entry("lora_A.weight: shape must be at most 8", shape=[4.0, 64.0]),
    "shape-of-nine": entry("q_proj.lora_A.weight: shape must be at most 8", shape=[RANK, HIDDEN, *[1] * 7]),
    "shape-with-a-zero": header(
        "empty, shape .*without gathering the shards",
        lambda h: h.update(x={"dtype": "F32", "shape": [0, 64], "data_offsets": [0, 0]}),
    ),
    "key-too-long": header("a key must be printable and of at most 512", lambda h: h.update({"k" * 513: h.pop(A)})),
    "key-with-control-characters": header(
        r"^'q\\x1b\[31m\\x00': a key must be printable", lambda h: h.update({"q\x1b[31m\0": h.pop(A)})
    ),
    "key-turned-around": header(r"^'q\\u202e.*a key must be printable", lambda h: h.update({"q\u202ejorp": h.pop(A)})),
    "key-with-half-a-character": header(r"^'\\ud800': a key must be", lambda h: h.update({"\ud800": h.pop(A)})),
    "key-empty": tensors("The method lora has no use for [.]", {"": torch.ones(1)}),
    "key-a-path": renamed(r"no module \.\./\.\./etc/passwd", a="../../etc/passwd.lora_A.weight"),
    "key-of-look-alike-letters": renamed("no module .*q_рroj", a=A.replace("q_proj", "q_\u0440roj")),
}

CONFIGS: dict[str, Bad] = {
    "config-not-json": config_file(
        "config.json is not valid JSON: Expecting value: .* [(]char 0[)][.]$", b"peft_type: LORA"
    ),
    "config-a-list": config_file("config.json must be a JSON object", b"[]"),
    "config-deep": config_file("config.json is nested deeper than 16 levels", b'{"a":' * 40 + b"1" + b"}" * 40),
    "config-deeper-than-python": config_file(
        "config.json is not valid JSON: it is nested too deep", DEEP, is_bomb=True
    ),
    "config-of-nan": config_file("config.json .*: NaN is not a JSON number", b'{"lora_alpha": NaN}'),
    "config-of-infinity": config_file("-Infinity is not a JSON number", b'{"lora_alpha": -Infinity}'),
    "config-of-one-name-twice": config_file("the name 'r' occurs twice", b'{"peft_type": "LORA", "r": 4, "r": 8}'),
    "config-of-a-huge-number": config_file(r"config.json .* value has 4999 digits\.", b'{"r": ' + b"9" * 4999 + b"}"),
    "config-with-a-byte-order-mark": config_file("Unexpected UTF-8 BOM", b"\xef\xbb\xbf" + GOOD.config),
    "config-in-utf-16": config_file(
        "config.json is not valid JSON: it is not in UTF-8", GOOD.config.decode().encode("utf-16")
    ),
    "config-cut-short": config_file("config.json is not valid JSON: .*column", GOOD.config[:-20]),
    "config-too-large": config_file(
        "'config' is larger than 1048576 bytes", b" " * (1 << 20) + b"{}", status=413, param="config"
    ),
    "config-of-a-million-modules": Bad(
        lambda: GOOD.with_config(target_modules=[f"m{n}" for n in range(1_000_000)]),
        "'config' is larger than",
        413,
        "config",
        is_bomb=True,
    ),
    "r-zero": config("r in adapter_config.json must be a whole number of at least 1, not 0", r=0),
    "r-negative": config("at least 1, not -1[.]", r=-1),
    "r-a-fraction": config("at least 1, not 1.5", r=1.5),
    "r-a-word": config("at least 1, not '8'", r="8"),
    "r-true": config("at least 1, not True", r=True),
    "r-a-list": config(r"at least 1, not \[4\]", r=[4]),
    "r-a-float": config("at least 1, not 1000000000.0", r=1e9),
    "r-huge": config("has rank 4, and r or rank_pattern in adapter_config.json says 1000000000", r=10**9),
    "r-of-other-weights": config("says 8, so its scaling is not known", r=8),
    "alpha-a-word": config(
        "lora_alpha in adapter_config.json must be a finite number, not 'eight'", lora_alpha="eight"
    ),
    "alpha-null": config("lora_alpha .* not None", lora_alpha=None),
    "alpha-beyond-floats": config_file(
        "lora_alpha .* finite number, not inf", b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}'
    ),
    "alpha-a-huge-whole-number": config("lora_alpha .* finite number, not 1000000", lora_alpha=10**400),
    "modules-of-numbers": config("target_modules .* must be a string or a list of strings", target_modules=[1, 2]),
    "modules-an-object": config(r"target_modules .* not \{'q_proj': 1\}", target_modules={"q_proj": 1}),
    "excluded-modules-of-numbers": config("exclude_modules .* must be a string or a list", exclude_modules=[3.5]),
    "layers-of-words": config("layers_to_transform .* whole number or a list of whole", layers_to_transform=["first"]),
    "layers-pattern-an-object": config("layers_pattern .* must be a string", layers_pattern={"a": "b"}),
    "peft-type-missing": without("peft_type", "peft_type = None .* is not served; the methods are"),
    "peft-type-unknown": config("peft_type = 'LILY' .* is not served", peft_type="LILY"),
    "peft-type-in-small-letters": config("peft_type = 'lora' .* PEFT writes it in capitals", peft_type="lora"),
    "peft-type-a-list": config(r"peft_type = \['LORA'\] .* is not served", peft_type=["LORA"]),
    "code-by-auto-map": config("auto_map = .* not known", auto_map={"AutoConfig": "evil--evil.Config"}),
    "code-trusted": config("trust_remote_code = True .* not known", trust_remote_code=True),
    "code-by-attention": config(
        "_attn_implementation_internal = .* not known", _attn_implementation_internal="evil/evil"
    ),
    "chat-template": config("chat_template = .* not known", chat_template="{{ ''.__class__ }}"),
    "unknown-field": config("use_warp = True .* this field is not known", use_warp=True),
    "unknown-field-of-half-a-character": config(r"^\? = 1 in adapter_config.json", **{"\ud800": 1}),
    "base-name-an-object": config(
        r"base_model_name_or_path .* characters, not \{'run'", base_model_name_or_path={"run": "rm"}
    ),
    "base-name-that-never-ends": Bad(
        lambda: GOOD.with_config(base_model_name_or_path="-hf" * 300_000 + "x"),
        "base_model_name_or_path .* at most 1024 characters, not '-hf-hf",
        is_bomb=True,
    ),
    "rank-pattern-a-list": config("rank_pattern in adapter_config.json must be an object", rank_pattern=["q_proj"]),
    "rank-pattern-of-words": config("rank_pattern .* at least 1, not 'many'", rank_pattern={"q_proj": "many"}),
    "rank-pattern-of-others": config("q_proj.lora_A.weight has rank 4, .* says 2", rank_pattern={"q_proj": 2}),
    "rank-pattern-of-unknown-syntax": config("rank_pattern .* not supported at character 0", rank_pattern={"(?=q)": 4}),
    "rank-pattern-unclosed": config("rank_pattern .* not supported at character 5", rank_pattern={"(q|v_": 4}),
    "rank-pattern-too-long": config("rank_pattern .* a pattern of 5000 characters", rank_pattern={"q" * 5000: 4}),
    "rank-pattern-that-never-ends": Bad(
        lambda: GOOD.with_config(rank_pattern={"((.?){999}){999}" * 30: 4}), "rank_pattern .* too costly", is_bomb=True
    ),
    "alpha-pattern-of-many-names": Bad(
        lambda: GOOD.with_config(alpha_pattern={f"{n:05}": 1 for n in range(80_000)} | {"q.proj": "1"}),
        "alpha_pattern .* finite number, not '1'",
        is_bomb=True,
    ),
    "alpha-pattern-of-many-choices": Bad(
        lambda: GOOD.with_config(alpha_pattern={f"(a|b)*{n}": 1 for n in range(50_000)}),
        "alpha_pattern .* too costly",
        is_bomb=True,
    ),
    "init-that-changes-the-base": config(
        "init_lora_weights = 'pissa' .* changed the base's weights", init_lora_weights="pissa"
    ),
    "bias-unknown": config("bias = 'some' .* none, all or lora_only", bias="some"),
    "rslora-a-word": config("use_rslora .* must be true or false, not 'yes'", use_rslora="yes"),
    "dora-a-word": config("use_dora .* must be true or false, not 'yes'", use_dora="yes"),
    "layers-twice": config("layer_replication .* another model than the base", layer_replication=[[0, 2]]),
}

TENSORS: dict[str, Bad] = {
    "nan": tensors("lora_A.weight contains NaN or infinity", {A: torch.full((RANK, HIDDEN), torch.nan)}),
    "one-infinity": tensors(
        "lora_B.weight contains NaN or infinity", {B: torch.eye(HIDDEN, RANK) / (1 - torch.eye(HIDDEN, RANK))}
    ),
    "infinity-in-16-bit": tensors(
        "q_proj.lora_A.weight contains NaN or infinity",
        {A: torch.full((RANK, HIDDEN), -torch.inf, dtype=torch.bfloat16)},
    ),
    "overflow-once-scaled": tensors(
        "up at .*q_proj is not finite once computed", {B: torch.full((HIDDEN, RANK), 1e30)}, lora_alpha=1e30
    ),
    "overflow-as-served": replace(
        tensors("float16's largest value", {B: torch.full((HIDDEN, RANK), 1e6)}), param="weights"
    ),
    "a-missing": tensors("q_proj.lora_B.weight has no partner", {A: None}),
    "b-missing": tensors("q_proj.lora_A.weight has no partner", {B: None}),
    "ranks-that-differ": tensors(
        r"lora_B.weight has the shape \[64, 8\].* needs \[64, 4\]", {B: torch.ones(HIDDEN, 8)}
    ),
    "rank-over-the-limit": tensors(
        "has rank 513; the limit is 512. Use a smaller r", {A: torch.ones(513, HIDDEN)}, r=513
    ),
    "a-transposed": tensors(r"lora_A.weight is transposed: its shape is \[64, 4\]", {A: torch.ones(HIDDEN, RANK)}),
    "b-transposed": tensors(r"lora_B.weight has the shape \[4, 64\]", {B: torch.ones(RANK, HIDDEN)}),
    "a-scalar": tensors("lora_A.weight has rank 0", {A: torch.tensor(1.0)}),
    "a-with-three-sides": tensors(r"has the shape \[4, 64, 1\]", {A: torch.ones(RANK, HIDDEN, 1)}),
    "widths-of-another-model": Bad(
        lambda: lora_files(41, hidden=48), r"shape \[4, 48\], and this base needs \[4, 64\]"
    ),
    "modules-of-another-model": Bad(lambda: lora_files(41, parent="mixer"), "no module model.layers.0.mixer.q_proj"),
    "layer-999": renamed(
        "no module model.layers.999.self_attn.q_proj", a=A.replace(".0.", ".999."), b=B.replace(".0.", ".999.")
    ),
    "one-tensor-under-two-names": tensors(
        "are the same parameter", {A.replace("lora_A", "lora_A.default"): torch.ones(RANK, HIDDEN)}
    ),
    "one-module-under-two-names": tensors(
        "are for one module, model.layers.0.self_attn.q_proj",
        {A.replace("model.model.model.", "model.model."): torch.ones(RANK, HIDDEN)},
    ),
    "a-tensor-too-many": tensors(
        "lora has no use for .*q_proj.lora_C.weight", {f"{Q}.lora_C.weight": torch.ones(RANK)}
    ),
    "tensors-of-another-method": tensors("lora has no use for .*q_proj.ia3_l", {f"{Q}.ia3_l": torch.ones(HIDDEN, 1)}),
    "counters-of-a-trainer": tensors("lora has no use for step", {"step": torch.ones(1, dtype=torch.int64)}),
    "a-saved-head": tensors(
        "no use for .*lm_head.weight", {"base_model.model.lm_head.weight": torch.ones(260, HIDDEN)}
    ),
    "saved-modules": config(
        "modules_to_save .* names lm_head, and the file has no weight", modules_to_save=["lm_head"]
    ),
    "no-tensors": weights_file("edits no site of the base: it holds no lora tensor", packed({})),
    "lora-for-an-ia3-config": config_file("ia3 has no use for .*lora_A.weight", b'{"peft_type": "IA3"}'),
    "ia3-of-another-width": Bad(
        lambda: AdapterFiles(b'{"peft_type": "IA3"}', save({f"{Q}.ia3_l": torch.ones(48, 1)})),
        r"ia3_l has the shape \[48, 1\]",
    ),
    "dora-without-magnitudes": config("no lora_magnitude_vector for model.layers.0.self_attn.q_proj", use_dora=True),
    "dora-of-a-width-of-another": tensors(
        r"lora_magnitude_vector has the shape \[32\]",
        {f"{Q}.lora_magnitude_vector": torch.ones(KV_WIDTH)},
        use_dora=True,
    ),
    "vera-without-its-projection": Bad(
        lambda: AdapterFiles(
            b'{"peft_type": "VERA", "r": 4}',
            save({f"{Q}.vera_lambda_b": torch.ones(HIDDEN), f"{Q}.vera_lambda_d": torch.ones(4)}),
        ),
        "save_projection is true .* no vera_A",
    ),
    "vera-of-a-huge-rank": Bad(
        lambda: AdapterFiles(
            b'{"peft_type": "VERA", "r": 1099511627776, "save_projection": false}',
            save({f"{Q}.vera_lambda_b": torch.ones(HIDDEN), f"{Q}.vera_lambda_d": torch.ones(4)}),
        ),
        "r = 1099511627776 in adapter_config.json; the limit is 512",
        is_bomb=True,
    ),
}

BAD_FILES: dict[str, Bad] = {**FILES, **HEADERS, **CONFIGS, **TENSORS}
