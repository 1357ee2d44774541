"""The token that begins a text is there once, whether the tokenizer adds it or the client wrote it."""

from server.model.tokenizer import Tokenizer
from tests.demo_files import BASE
from tests.models import byte_tokenizer

DEMO = Tokenizer.load(str(BASE), frozenset())  # begins every text with <|begin|>
BYTES = Tokenizer(byte_tokenizer(), frozenset())  # knows <|begin|> and does not add it


def test_a_text_that_brings_its_own_beginning_is_the_same_prompt() -> None:
    assert DEMO.encode("<|begin|>Once upon") == DEMO.encode("Once upon")


def test_only_what_would_be_added_is_left_out() -> None:
    begin = DEMO.encode("")
    assert DEMO.encode("<|begin|><|begin|>Once") == begin + DEMO.encode("Once")
    assert DEMO.encode("<|begin|>Once", add_special_tokens=False) == DEMO.encode("Once")
    assert DEMO.encode("Once <|begin|>").count(begin[0]) == 2


def test_where_nothing_is_added_nothing_is_left_out() -> None:
    once = BYTES.encode("<|begin|>")
    assert len(once) == 1
    assert BYTES.encode("<|begin|><|begin|>x") == once * 2 + BYTES.encode("x")
