"""The program of a process that reads tensors out of pickles: torch and safetensors alone, under limits.

A pickle is a program. torch reads it with `weights_only`, which knows tensors and no more, and it does so here, so that
a mistake in that, or a file that asks for all memory, ends this process and nothing else. Runs as a script, by its path
and isolated. Knows nothing about adapters.

On stdin a JSON list of the paths of the files. Each becomes `<its number>.safetensors` in the folder that the command
line names, its floating tensors as float32, its other tensors left out. On stdout JSON: {} at the end, or {"file": its
number, "words": what is wrong with it}.
"""

import json
import os
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_MAX_TENSORS = 16  # of one file; those of pyreft have at most 6
_MAX_NAME_LENGTH = 200


class _Unfit(Exception):
    """A file that holds something else than a few named tensors; the message says what."""


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Unfit("it holds more than tensors, so it is not read") from error
    if not isinstance(content, dict) or len(content) > _MAX_TENSORS:
        raise _Unfit(f"it is no state dict of at most {_MAX_TENSORS} tensors")
    num_bytes = path.stat().st_size
    found = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or len(name) > _MAX_NAME_LENGTH or type(tensor) is not torch.Tensor:
            raise _Unfit("it is no state dict: it must hold tensors by name")
        if tensor.numel() > num_bytes:  # a view that repeats a few numbers
            raise _Unfit(f"{name} has more numbers than the file has bytes")
        if tensor.is_floating_point():
            found[name] = tensor.detach().float().contiguous().clone()
    return found


def _limit(max_bytes: int, cpu_s: int) -> None:
    """Of memory: beyond what torch has taken already. A file that is written may be as large as that, too."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    address_space = pages * os.sysconf("SC_PAGE_SIZE") + max_bytes
    limits = {
        resource.RLIMIT_AS: address_space,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: max_bytes,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def main(folder: Path, max_bytes: int, cpu_s: int) -> dict[str, Any]:
    """Reads the files that stdin names, one after another; the answer is printed by the caller."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an error
    paths = json.loads(sys.stdin.read())
    _limit(max_bytes, cpu_s)
    for number, path in enumerate(paths):
        try:
            save_file(_tensors(Path(path)), str(folder / f"{number}.safetensors"))
        except _Unfit as error:
            return {"file": number, "words": str(error)}
        except (MemoryError, RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            return {"file": number, "words": f"it cannot be read ({reason})"}
    return {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
