"""vLLM's and SGLang's LoRA kernels as ways of the kernels' benchmark, run from the files of their own packages.

    python -m load_tests.peer_kernels --fetch .peers       takes the few files that are needed from the released wheels
    python -m load_tests.kernels --peers .peers            runs them; the folder may be an environment's site-packages

Only the modules of the kernels are imported. Their packages' own start wants a CUDA build, a platform and a server's
settings, so while the kernels are imported, and no longer, an importer answers for those two names: a package is its
folder and its `__init__` is not run, and what the kernels ask of the rest of their server is a stand-in, listed below
with the server's own default. A package of that name which is loaded already stays what it is.

Owns that importer, the stand-ins, what each server prepares before a layer runs (here from the same adapters, in the
form in which it is best), and the download. Knows nothing about time, nor about who compares.
"""

import argparse
import importlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from load_tests.kernel_cases import Batch, Case, Group
from load_tests.kernel_ways import Run, TwoLaunches, Way

# What `--fetch` asks the package index for, and the files that it keeps.
_WHEELS: Mapping[str, tuple[str, ...]] = {
    "vllm==0.33.0": ("vllm/lora/ops/triton_ops/*.py", "vllm-*.dist-info/METADATA", "vllm-*.dist-info/licenses/*"),
    "sglang==0.5.23": (
        "sglang/kernels/ops/lora/dense/*.py",
        "sglang/kernels/ops/lora/common/*.py",
        "sglang/kernels/ops/lora/dense/csgmv_configs/*.json",
        "sglang/srt/lora/utils.py",
        "sglang/srt/lora/workspace.py",
        "sglang/srt/lora/dense/*.py",
        "sglang/srt/lora/dense/configs/*.json",
        "sglang-*.dist-info/METADATA",
        "sglang-*.dist-info/licenses/*",
    ),
}

StandIns = Mapping[str, Mapping[str, object]]  # module -> its attributes


class _Filled(Loader):
    """A module that is no file's: a package with these attributes."""

    def __init__(self, attributes: Mapping[str, object]) -> None:
        self._attributes = attributes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._attributes)


class _Finder(MetaPathFinder):
    """Answers for a top-level name and for stand-ins: these first, then folders as bare packages, then files."""

    def __init__(self, top: str, folder: Path, stand_ins: StandIns) -> None:
        self._top, self._folder, self._stand_ins = top, folder, stand_ins

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        parts = fullname.split(".")
        if parts[0] != self._top and fullname not in self._stand_ins:
            return None
        place = self._folder.joinpath(*parts)
        leads_on = any(name.startswith(f"{fullname}.") for name in self._stand_ins)
        if fullname in self._stand_ins or leads_on or place.is_dir():
            spec = ModuleSpec(fullname, _Filled(self._stand_ins.get(fullname, {})), is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        return spec_from_file_location(fullname, file) if file.is_file() else None


@contextmanager
def importing(top: str, folder: Path, stand_ins: StandIns) -> Iterator[None]:
    """While it lasts, `top` and what is below come from `folder`; afterwards all modules of its name are as before."""
    tops = {name.split(".")[0] for name in (top, *stand_ins)}

    def own() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in tops}

    before = own()
    for name in before:
        del sys.modules[name]
    finder = _Finder(top, folder, stand_ins)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in own():
            del sys.modules[name]
        sys.modules.update(before)


class _Quiet(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic for type checkers only
    """vLLM's loggers have two more verbs."""

    def info_once(self, message: str, *arguments: object) -> None:
        self.debug(message, *arguments)

    warning_once = info_once


class _Setting:
    """One of SGLang's settings from the environment."""

    def __init__(self, value: bool | None) -> None:
        self._value = value

    def get(self) -> bool | None:
        return self._value


class _Record:
    """What SGLang's kernels use of msgspec: a class of named fields."""

    def __init_subclass__(cls, **_: object) -> None:
        dataclass(kw_only=True)(cls)


class _Platform:
    """What vLLM's kernels ask of the device."""

    @staticmethod
    def is_cuda() -> bool:
        return torch.cuda.is_available()

    @staticmethod
    def is_device_capability(capability: int) -> bool:
        return _capability() == capability

    @staticmethod
    def has_device_capability(capability: int) -> bool:
        return _capability() >= capability


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _on_device(data: list[int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(data, dtype=dtype, device=device)


def _no_custom_op(**_: object) -> None:
    raise AttributeError("no custom operators: vLLM then takes the plain function")


def _as_it_is(_: object) -> Callable[[Any], Any]:
    """For SGLang's cache of compiled kernels, which saves time on the CPU, does not know the rank, and is optional."""
    return lambda kernel: kernel


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _vllm_stand_ins() -> StandIns:
    triton = importlib.import_module("triton")
    return {
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False, "VLLM_LORA_ENABLE_DUAL_STREAM": False, "VLLM_LORA_DISABLE_PDL": False,
            "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
        },
        "vllm.logger": {"init_logger": lambda name: _Quiet(logging.getLogger(name))},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"triton": triton, "tl": importlib.import_module("triton.language")},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {"async_tensor_h2d": _on_device, "direct_register_custom_op": _no_custom_op},
    }  # fmt: skip


def _sglang_stand_ins() -> StandIns:
    # Split K is an option that SGLang measured to be faster, for one rank; whoever wants it fast takes it.
    settings = {"SGLANG_ENABLE_LORA_CSGMV_SPLIT_K": True, "SGLANG_ENABLE_DETERMINISTIC_INFERENCE": False,
                "SGLANG_LORA_DENSE_CONFIG_DIR": None}  # fmt: skip
    return {
        "msgspec": {"Struct": _Record},
        # Only for making routes, which are made here.
        "sglang.kernels.ops.lora.moe.virtual_experts": {"_align_block_size_jit": None},
        "sglang.srt.environ": {"envs": SimpleNamespace(**{name: _Setting(on) for name, on in settings.items()})},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
        "sglang.srt.utils": {"cached_triton_kernel": _as_it_is, "get_device_name": _device_name},
        "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
    }


def _only_lora(group: Group, batch: Batch) -> str | None:
    return None if batch.is_plain else "LoRA alone: no DoRA, no VeRA"


@dataclass(frozen=True, slots=True)
class Peers:
    """The ways that were found, the version of each server (None for one that was not), and what did not load."""

    ways: tuple[Way, ...]
    versions: Mapping[str, str | None]
    failures: tuple[str, ...] = ()


def found(folders: Sequence[Path]) -> Peers:
    """What lies in these folders: `vllm/` and `sglang/` with the package's metadata beside them."""
    ways: list[Way] = []
    versions: dict[str, str | None] = {}
    failures: list[str] = []
    for name, loads in (("vllm", (_vllm_ways,)), ("sglang", (_sglang_ways, _sglang_planned_ways))):
        folder = next((folder for folder in folders if (folder / name).is_dir()), None)
        versions[name] = None if folder is None else version_in(folder, name)
        for load in loads if folder is not None else ():
            try:
                ways += load((folder or Path()).resolve())
            except Exception as failure:  # of another release, say; the others can still be measured
                failures.append(f"{name}, {load.__name__}: {type(failure).__name__}: {failure}")
    return Peers(tuple(ways), versions, tuple(failures))


def version_in(folder: Path, name: str) -> str:
    """As the package's metadata say it."""
    for file in sorted(folder.glob(f"{name}*.dist-info/METADATA")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("Version: "):
                return line.removeprefix("Version: ")
    return "unknown"


# vLLM


def _vllm_ways(folder: Path) -> list[Way]:
    ops = "vllm.lora.ops.triton_ops"
    with importing("vllm", folder, _vllm_stand_ins()):
        names = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")
        modules = SimpleNamespace(**{name: importlib.import_module(f"{ops}.{name}") for name in names})
    return [Way("vllm", lambda case: _vllm_run(case, modules), _only_lora, is_peer=True, is_half_only=True)]


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)  # that a slot can have


def _vllm_run(case: Case, vllm: Any) -> Run:
    """A slot for each adapter, all of the largest rank; a grid for as many adapters as the batch has."""
    # It knows tensors by their address, and those of an earlier case may have lain there.
    vllm.utils._LORA_A_PTR_DICT.clear()
    vllm.utils._LORA_B_PTR_DICT.clear()
    rank = next(rank for rank in _VLLM_RANKS if rank >= case.batch.max_rank)
    num_adapters, num_members = len(case.weights), len(case.group.widths)
    downs = tuple(case.x.new_zeros(num_adapters, 1, rank, case.group.d_in) for _ in range(num_members))
    ups = tuple(case.x.new_zeros(num_adapters, 1, width, rank) for width in case.group.widths)
    for slot, own in enumerate(case.weights):
        for member, weights in enumerate(own):
            downs[member][slot, 0, : weights.down.shape[0]] = weights.down
            ups[member][slot, 0, :, : weights.up.shape[0]] = weights.up.t()
    num_tokens = len(case.slots)
    meta = vllm.lora_kernel_metadata.LoRAKernelMeta.make(num_adapters, num_tokens, case.device)
    meta.prepare_tensors((case.slots - 1).to(case.device))
    arguments = meta.meta_args(num_tokens, specialize_active_lora=True)

    def shrink(x: torch.Tensor) -> torch.Tensor:
        h = torch.empty(num_members, num_tokens, rank, dtype=torch.float32, device=x.device)
        vllm.lora_shrink_op.lora_shrink(x, downs, h, *arguments, 1.0)
        return h

    def expand(h: torch.Tensor, y: torch.Tensor) -> None:
        vllm.lora_expand_op.lora_expand(h, ups, y, *arguments, offset_start=0, add_inputs=True)

    return TwoLaunches(shrink, expand)


# SGLang

_LEAST_CHUNK = 16
_LONG_CHUNK = 128  # the longest that its backend can be told to cut; it then does so from here on:
_MIN_LONG_TOKENS = 256


def _sglang_ways(folder: Path) -> list[Way]:
    dense = "sglang.kernels.ops.lora.dense"
    with importing("sglang", folder, _sglang_stand_ins()):
        names = ("chunked_sgmv_shrink", "chunked_sgmv_expand", "sgemm_lora_a", "sgemm_lora_b", "qkv_lora_b",
                 "gate_up_lora_b")  # fmt: skip
        modules = SimpleNamespace(**{name: importlib.import_module(f"{dense}.{name}") for name in names})
        modules.utils = importlib.import_module("sglang.srt.lora.utils")
    return [
        Way("sglang chunks of 16", lambda case: _chunked_run(case, modules, _LEAST_CHUNK), _only_lora, is_peer=True),
        Way("sglang chunks of 128", lambda case: _chunked_run(case, modules, _LONG_CHUNK), _too_short, is_peer=True),
        Way("sglang sgemm", lambda case: _sgemm_run(case, modules), _no_sgemm, is_peer=True),
    ]


def _too_short(group: Group, batch: Batch) -> str | None:
    if len(batch.slots) < _MIN_LONG_TOKENS:
        return f"chunks of {_LONG_CHUNK} are for {_MIN_LONG_TOKENS} tokens or more"
    return _only_lora(group, batch)


def _no_sgemm(group: Group, batch: Batch) -> str | None:
    if len(group.widths) > 3 or (len(group.widths) == 2 and len(set(group.widths)) > 1):
        return "no kernel for this number of linears"
    return _only_lora(group, batch)


@dataclass(frozen=True, slots=True)
class _SglangWeights:
    """All adapters' matrices as its memory pool has them: an adapter's members follow one another in its own rank."""

    down: torch.Tensor  # (adapters, members * max_rank, d_in)
    up: torch.Tensor  # (adapters, sum of widths, max_rank)
    offsets: torch.Tensor  # (members + 1,) int32, on the CPU

    @classmethod
    def of(cls, case: Case) -> "_SglangWeights":
        rank, widths = case.batch.max_rank, case.group.widths
        down = case.x.new_zeros(len(case.weights), len(widths) * rank, case.group.d_in)
        up = case.x.new_zeros(len(case.weights), sum(widths), rank)
        for slot, own in enumerate(case.weights):
            packed = torch.cat([weights.down for weights in own])
            down[slot, : len(packed)] = packed
            packed = torch.cat([weights.up for weights in own], dim=1)
            up[slot, :, : len(packed)] = packed.t()
        return cls(down, up, torch.tensor([sum(widths[:m]) for m in range(len(widths) + 1)], dtype=torch.int32))


def _batch_info(case: Case, sglang: Any, chunk: int | None) -> Any:
    """Segments of one adapter each, of at most `chunk` tokens; without it, one segment for each adapter."""
    ordered, order = torch.sort(case.slots - 1, stable=True)
    adapters, counts = torch.unique_consecutive(ordered, return_counts=True)
    segments = [(int(adapter), min(chunk or int(count), int(count) - first))
                for adapter, count in zip(adapters, counts, strict=True)
                for first in range(0, int(count), chunk or int(count))]  # fmt: skip
    lengths = torch.tensor([length for _, length in segments])

    def sent(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(case.device, torch.int32)

    return sglang.utils.LoRABatchInfo(
        use_cuda_graph=False, bs=len(segments), num_segments=len(segments), max_len=chunk or int(counts.max()),
        seg_indptr=sent(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])), seg_lens=sent(lengths),
        weight_indices=sent(torch.tensor([adapter for adapter, _ in segments])), permutation=sent(order),
        lora_ranks=sent(torch.tensor([adapter.rank for adapter in case.batch.adapters])),
        scalings=torch.ones(len(case.weights), device=case.device),
    )  # fmt: skip


def _chunked_run(case: Case, sglang: Any, chunk: int) -> Run:
    """Its backend `csgmv`, the default."""
    weights, info = _SglangWeights.of(case), _batch_info(case, sglang, chunk)
    num_members, offsets, widest = len(case.group.widths), weights.offsets.to(case.device), max(case.group.widths)

    def shrink(x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = sglang.chunked_sgmv_shrink.chunked_sgmv_lora_shrink_forward(
            x, weights.down, info, num_slices=num_members
        )
        return h

    def expand(h: torch.Tensor, y: torch.Tensor) -> None:
        sglang.chunked_sgmv_expand.chunked_sgmv_lora_expand_forward(
            h, weights.up, info, offsets, widest, base_output=y, slice_offsets_cpu=weights.offsets
        )

    return TwoLaunches(shrink, expand)


def _sgemm_run(case: Case, sglang: Any) -> Run:
    """Its backend `triton`, with the segments of an adapter joined."""
    weights, info = _SglangWeights.of(case), _batch_info(case, sglang, None)
    num_members, offsets, widest = len(case.group.widths), weights.offsets.to(case.device), max(case.group.widths)

    def shrink(x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = sglang.sgemm_lora_a.sgemm_lora_a_fwd(x, weights.down, info, stack_num=num_members)
        return h

    def expand(h: torch.Tensor, y: torch.Tensor) -> None:
        if num_members == 1:
            sglang.sgemm_lora_b.sgemm_lora_b_fwd(h, weights.up, info, base_output=y)
        elif num_members == 2:
            sglang.gate_up_lora_b.gate_up_lora_b_fwd(h, weights.up, info, widest, base_output=y)
        else:
            sglang.qkv_lora_b.qkv_lora_b_fwd(h, weights.up, info, offsets, widest, base_output=y)

    return TwoLaunches(shrink, expand)


def _sglang_planned_ways(folder: Path) -> list[Way]:
    """By itself, for it also wants pydantic, and is young."""
    with importing("sglang", folder, _sglang_stand_ins()):
        modules = SimpleNamespace(
            runner=importlib.import_module("sglang.srt.lora.dense.runner"),
            lora_b=importlib.import_module("sglang.kernels.ops.lora.common.lora_b"),
            workspace=importlib.import_module("sglang.srt.lora.workspace"),
            utils=importlib.import_module("sglang.srt.lora.utils"),
        )
        for architecture in ("default", "sm90", "sm100"):  # read once, with an import of its own
            modules.runner.load_plans(architecture)
    modules.runner.slice_geometry = _geometry_anywhere(modules.lora_b, modules.runner.slice_geometry)
    return [Way("sglang plans", lambda case: _planned_run(case, modules), _only_lora, is_peer=True)]


_MIN_PREFILL = 256  # tokens from which a batch counts as a prefill: ours decode 64 at most


def _planned_run(case: Case, sglang: Any) -> Run:
    """Its backend `triton_v2`: a table of plans for each GPU says which kernels, blocks and parts to take.

    Where a plan would run `shrink` beside the base's product, it runs before `expand` here, as all others do.
    """
    weights, num_tokens, num_members = _SglangWeights.of(case), len(case.slots), len(case.group.widths)
    offsets = tuple(weights.offsets.tolist())
    token_slots = (case.slots - 1).to(case.device, torch.int32)
    runner = sglang.runner.DenseLoraRunner(
        sglang.workspace.LoraWorkspace(), max_loras=len(case.weights), device=case.device
    )
    runner.begin_batch(
        token_slots=token_slots, num_tokens=num_tokens, graph_mode=False,
        lora_ranks=torch.tensor([adapter.rank for adapter in case.batch.adapters], dtype=torch.int32).to(case.device),
        scalings=torch.ones(len(case.weights), device=case.device),
        phase=sglang.utils.Phase.PREFILL if num_tokens >= _MIN_PREFILL else sglang.utils.Phase.DECODE,
    )  # fmt: skip
    plan = runner.plan_for(
        sglang.runner.DenseLoraKind.LINEAR, case.batch.max_rank, case.group.d_in, offsets[-1], num_tokens=num_tokens
    )
    route = _route(case, sglang, token_slots, plan.block_size)
    runner.route = lambda block_size: route  # made once for a step, not for a layer

    def shrink(x: torch.Tensor) -> Any:
        return runner.run_a(x, weights.down, stack=num_members, plan=plan)

    def expand(h: Any, y: torch.Tensor) -> None:
        runner.run_b(h, weights.up, y, offsets=offsets, plan=plan)

    return TwoLaunches(shrink, expand)


def _geometry_anywhere(lora_b: Any, on_gpu: Callable[..., Any]) -> Callable[..., Any]:
    """Its own on a GPU. It refuses a CPU, where the interpreter gets the same without what it knows of equal slices."""

    def geometry(offsets: Sequence[int], block_size_n: int, device: torch.device) -> Any:
        if device.type == "cuda":
            return on_gpu(offsets, block_size_n, device)
        starts = torch.tensor(offsets, dtype=torch.int32)
        return lora_b.SliceGeometry(
            slice_offsets=starts, out_offsets=starts[:-1], num_slices=len(offsets) - 1,
            num_column_tiles=sum(-(-int(width) // block_size_n) for width in starts.diff()),
            uniform_width=0, out_stride=0, full_tiles=False, block_size_n=block_size_n,
        )  # fmt: skip

    return geometry


def _route(case: Case, sglang: Any, token_slots: torch.Tensor, block_size: int) -> Any:
    """The tokens by adapter, each adapter's filled up to whole blocks with a number that is no token's."""
    num_tokens = len(case.slots)
    order: list[torch.Tensor] = []
    adapters: list[int] = []
    for slot in range(1, len(case.weights) + 1):
        own = torch.nonzero(case.slots == slot)[:, 0]
        num_blocks = -(-len(own) // block_size)
        order += [own, own.new_full((num_blocks * block_size - len(own),), num_tokens)]
        adapters += [slot - 1] * num_blocks
    return sglang.runner.RouteView(
        view=sglang.runner.RouteViewKind.ALIGNED, block_size=block_size, token_slots=token_slots, group_ids=None,
        groups_per_slot=1, max_loras=len(case.weights),
        maybe_sorted_pair_ids=torch.cat(order).to(case.device, torch.int32),
        maybe_block_bucket_ids=torch.tensor(adapters, dtype=torch.int32).to(case.device),
        maybe_num_pairs_post_padded=torch.tensor([len(adapters) * block_size], dtype=torch.int32).to(case.device),
    )  # fmt: skip


# The files


def fetch(folder: Path) -> None:
    """Downloads the wheels and keeps what is needed of them in `folder`. Raises CalledProcessError where pip fails."""
    for wheel, kept in _WHEELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            # The Python files are the same for every platform, and there is a wheel for this one.
            platforms = ["--platform", "manylinux_2_34_x86_64", "--platform", "manylinux_2_28_x86_64"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, *platforms, "--dest", scratch, wheel], check=True)
            for file in Path(scratch).glob("*.whl"):
                unpack(file, folder, kept)


def unpack(wheel: Path, folder: Path, kept: Sequence[str]) -> None:
    """Writes the files of the wheel that match any of these patterns."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith("/") and any(fnmatch(name, pattern) for pattern in kept):
                archive.extract(name, folder)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.peer_kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--fetch", type=Path, required=True, metavar="DIR", help="where their files shall lie")
    folder = parser.parse_args(arguments).fetch
    fetch(folder)
    for name in ("vllm", "sglang"):
        print(f"{name} {version_in(folder, name)} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
