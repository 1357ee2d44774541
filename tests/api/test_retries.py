"""What clients read about coming again: one story in all headers, on every answer that asks for it and no other."""

import pytest

from server.api.errors import error_response
from server.ground import errors
from server.ground.errors import GraftError, Overloaded
from tests.api.conftest import Gate, Live, eventually

EVERY = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GraftError)]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_kind_of_error_says_whether_to_come_again(kind: type[GraftError]) -> None:
    answer = error_response(kind("It failed."))
    waits = {"retry-after", "retry-after-ms", "x-should-retry"} & set(answer.headers)
    if answer.status_code in (429, 503):
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after-ms"]) == 1000 * int(answer.headers["retry-after"]) > 0
        assert int(answer.headers["retry-after"]) <= 60  # OpenAI's clients give up on longer waits
    elif answer.status_code in (409, 412, 504, 507):
        assert waits == {"x-should-retry"}
        assert answer.headers["x-should-retry"] == "false"
    else:
        assert not waits


def test_a_wait_is_the_same_in_seconds_and_milliseconds() -> None:
    answer = error_response(Overloaded("Full.", retry_after_s=7))
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("7", "7000")


def test_openais_client_comes_again_and_is_served(strict: Live, strict_gate: Gate) -> None:
    engine = strict.server.engine
    with strict.send("/v1/completions", prompt="Hi", max_tokens=100):
        eventually(lambda: engine.stats().num_running == 1)
        with strict.send("/v1/completions", prompt="Hi", max_tokens=1, n=4):
            eventually(lambda: engine.stats().num_waiting == 4)
            refused = strict.post("/v1/completions", prompt="Hi", max_tokens=1)
            assert refused.status_code == 503
            strict_gate.allow(100_000)
            patient = strict.openai.with_options(max_retries=20)
            assert patient.completions.create(model="tiny", prompt="Hi", max_tokens=1).choices
