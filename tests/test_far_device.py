"""The far device tells who would wait for a GPU, from who would not; and what is on its way is not there yet."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from server.engine.chosen import Reading
from server.ops.sending import Packing, send
from tests.far_device import FAR, Waited, contents, far_device

Call = Callable[[torch.Tensor], object]


@pytest.fixture(autouse=True)
def _far() -> Iterator[None]:
    with far_device():
        yield


WAITING: dict[str, Call] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "a condition": lambda x: bool((x > 1).all()),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "to the CPU, said to block nobody": lambda x: x.to("cpu", non_blocking=True),
    "copy_ into ordinary memory": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "copy_ into pinned memory, blocking": lambda x: torch.empty(3, pin_memory=True).copy_(x),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: (x > 1).nonzero(),
    "where with one argument": lambda x: torch.where(x > 1),
    "a mask as index": lambda x: x[x > 1],
    "a mask that is written through": lambda x: x.__setitem__(x > 1, 0.0),
    "repeat_interleave of unknown length": lambda x: x.repeat_interleave(x.long()),
    "a list as tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "a list as new_tensor": lambda x: x.new_tensor([1.0]),
    "a list as index": lambda x: x[[0, 1]],
    "an index that lies on the CPU": lambda x: x[torch.tensor([0, 1])],
    "a tensor of the CPU that is written": lambda x: x.__setitem__(slice(2), torch.ones(2)),
    "a copy from ordinary memory": lambda x: torch.ones(3).to(x.device),
    "a copy from ordinary memory, said to block nobody": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a copy from pinned memory, blocking": lambda x: torch.ones(3).pin_memory().to(x.device),
    "copy_ from ordinary memory": lambda x: x.copy_(torch.ones(3), non_blocking=True),
}
FREE: dict[str, Call] = {
    "arithmetic": lambda x: (x + 1) * x.amax(dim=-1),
    "a layer": lambda x: F.linear(x[None], torch.ones(2, 3, device=x.device)),
    "numbers that are made there": lambda x: torch.arange(3, device=x.device) + x.new_full((3,), 2.0),
    "another dtype": lambda x: x.to(torch.float16),
    "an index that lies there": lambda x: x[x.argsort()],
    "an index that is a number": lambda x: x[1],
    "a number that is written": lambda x: x.__setitem__(0, 5.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "repeat_interleave of known length": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "copy_ from pinned memory": lambda x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True),
    "copy_ into pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    "send": lambda x: x + send(torch.ones(3), x.device),
    "a view of what was sent": lambda x: x[send(torch.arange(6), x.device)[1:3]],
}


def there() -> torch.Tensor:
    return torch.arange(3.0, device=FAR)


@pytest.mark.parametrize("name", WAITING)
def test_who_waits_is_told(name: str) -> None:
    with pytest.raises(Waited):
        WAITING[name](there())


@pytest.mark.parametrize("name", FREE)
def test_who_does_not_wait_is_left_alone(name: str) -> None:
    FREE[name](there())


def test_what_is_made_of_tensors_there_is_there() -> None:
    found = torch.cat([there(), there() + 1]).split(2)
    assert {part.device for part in found} == {FAR}


def test_tensors_of_both_sides_do_not_meet() -> None:
    with pytest.raises(AssertionError, match="add of tensors of the CPU and of the device"):
        there() + torch.ones(3)


def test_what_was_sent_is_there() -> None:
    packing = Packing()
    packing.add("one", [1, 2])
    packing.add("other", [3])
    parts = packing.send(FAR)
    assert {name: contents(part).tolist() for name, part in parts.items()} == {"one": [1, 2], "other": [3]}


def test_what_comes_back_is_rubbish_until_it_has_been_waited_for() -> None:
    numbers = there()
    reading, later = Reading(numbers, numbers > 1), Reading(numbers)
    numbers.zero_()  # after the copies, in the device's line
    assert reading._host[0].tolist() != [0, 1, 2]
    assert [part.tolist() for part in reading.wait()] == [[0, 1, 2], [False, False, True]]
    assert later._host[0].tolist() != [0, 1, 2]
    assert later.wait()[0].tolist() == [0, 1, 2]
