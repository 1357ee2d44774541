"""A device that is far away: it calls itself CUDA and computes on the CPU, and who would wait for it gets `Waited`.

Owns what of PyTorch waits for a GPU: reading a tensor, copies that are not between pinned memory and the device's line,
indices that lie on the other side, shapes that depend on numbers. What comes back is rubbish until the event behind it
has been waited for. Sees calls from Python, of one thread; what an operator does inside is not looked at.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

FAR = torch.device("cuda")
_READING = {
    "tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "__repr__", "equal", "allclose", "is_nonzero",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount",  # as long as numbers say
}  # fmt: skip
_COPYING_LISTS = {"tensor", "as_tensor", "new_tensor", "asarray"}
_RUBBISH = -77


class Waited(AssertionError):
    """Somebody would have waited until the device has done all that it was given."""


class FarTensor(torch.Tensor):
    """A tensor of the far device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return FAR


@dataclass(frozen=True)
class _Call:
    """A call of one of PyTorch's functions, by its name."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @cached_property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    @cached_property
    def has_far(self) -> bool:
        return any(isinstance(leaf, FarTensor) for leaf in self.leaves)

    @cached_property
    def target(self) -> torch.device | None:
        """The device that it names."""
        if self.name in ("cuda", "cpu"):
            return torch.device(self.name)
        return next((torch.device(leaf) for leaf in self.leaves if _is_device(leaf)), None)

    @property
    def goes_far(self) -> bool:
        return self.target == FAR if self.target is not None else self.has_far

    @property
    def has_near(self) -> bool:
        """Whether a tensor of the CPU is among its arguments that is no single number: those are passed by value."""
        return any(map(_is_near, self.leaves))


class FarDevice(TorchFunctionMode):
    """While it is entered, `FAR` is a device."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[int, torch.Tensor] = {}  # by the address of their memory, which so is nobody else's
        self.coming: list[tuple[torch.Tensor, torch.Tensor]] = []  # (on the CPU, what will be there)
        self._may_wait = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Where it does not matter, as at the start of a server."""
        before, self._may_wait = self._may_wait, True
        try:
            yield
        finally:
            self._may_wait = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = dict(kwargs or {})
        is_pinned = bool(own.pop("pin_memory", False))
        call = _Call(getattr(func, "__name__", ""), args, own)
        if not self._may_wait:
            self._check(call)
        if call.name == "copy_" and call.has_far and not isinstance(args[0], FarTensor):
            return self._bring(*args[:2])
        if call.name == "pin_memory":
            func, is_pinned = torch.Tensor.clone, True
        if call.name == "cuda":
            func = torch.Tensor.to
            args = (*args, FAR)
        computed_args, computed_kwargs = pytree.tree_map(_computed_on, (args, own))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*computed_args, **computed_kwargs)
        if is_pinned:
            self._pinned[found.untyped_storage().data_ptr()] = found
        return pytree.tree_map(_far, found) if call.goes_far else found

    def _check(self, call: _Call) -> None:
        if call.name in _COPYING_LISTS and (call.goes_far or call.has_far):
            raise Waited(f"{call.name} copies from ordinary memory to the device")
        if call.name in ("to", "cuda") and call.goes_far and not call.has_far:
            self._check_copy(call.args[0], call)
        if not call.has_far:
            return
        if call.name in _READING or (call.name == "to" and not call.goes_far):
            raise Waited(f"{call.name} reads from the device")
        if call.name == "where" and len(call.leaves) == 1:
            raise Waited("where with one argument is as long as numbers say")
        is_repeated = call.name == "repeat_interleave" and isinstance(call.args[1], torch.Tensor)
        if is_repeated and call.kwargs.get("output_size") is None:
            raise Waited("repeat_interleave without output_size is as long as numbers say")
        if call.name in ("__getitem__", "__setitem__"):
            _check_index(call.args[1], *call.args[2:])
        elif call.name == "copy_":
            for host in filter(_is_near, call.args[:2]):
                self._check_copy(host, call)
        elif call.has_near and call.name != "__get__":
            raise AssertionError(f"{call.name} of tensors of the CPU and of the device")

    def _check_copy(self, host: torch.Tensor, call: _Call) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            is_pinned = host.untyped_storage().data_ptr() in self._pinned
        if not is_pinned or not call.kwargs.get("non_blocking"):
            raise Waited("a copy between the device and memory that is not pinned, or one that is not non_blocking")

    def _bring(self, host: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            self.coming.append((host, far.clone()))
            return host.fill_(_RUBBISH)


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.split(":")[0] in ("cuda", "cpu"))


def _is_near(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, FarTensor) and leaf.dim() > 0


def _computed_on(leaf: Any) -> Any:
    return torch.device("cpu") if _is_device(leaf) and torch.device(leaf) == FAR else leaf


def _far(found: Any) -> Any:
    return found.as_subclass(FarTensor) if type(found) is torch.Tensor else found


def _check_index(index: Any, *written: Any) -> None:
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, list) or _is_near(part):
            raise Waited("an index that lies on the CPU")
        if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
            raise Waited("a mask as index: as many as numbers say")
    if any(map(_is_near, written)):
        raise Waited("a tensor of the CPU is written to the device")


def contents(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, wherever it lies, for tests to look at."""
    with torch._C.DisableTorchFunction():
        return tensor.clone().as_subclass(torch.Tensor)


@contextmanager
def far_device() -> Iterator[FarDevice]:
    """The device. All its streams are one line, whose events are marks in it."""
    device = FarDevice()

    class Event:
        def record(self) -> "Event":
            self._before, device.coming = device.coming, []
            return self

        def synchronize(self) -> None:
            with torch._C.DisableTorchFunctionSubclass():
                for host, numbers in self._before:
                    host.copy_(numbers)

    class Stream:
        def __init__(self, device: torch.device | None = None) -> None:
            """Whatever the device."""

        def record_event(self) -> Event:
            return Event().record()

        def wait_event(self, event: Event) -> None:
            """It is before all that comes."""

    with pytest.MonkeyPatch.context() as patch, device:
        for name, twin in (("Event", Event), ("Stream", Stream), ("current_stream", Stream), ("stream", nullcontext)):
            patch.setattr(torch.cuda, name, twin)
        yield device


def send_away(model: nn.Module) -> None:
    """Puts a model's parameters and buffers on the far device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                far = parameter.detach().as_subclass(FarTensor)
                module._parameters[name] = nn.Parameter(far, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.as_subclass(FarTensor)
