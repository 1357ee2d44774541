"""Tokens over HTTP, as vLLM's routes have them: the same tokens that a request for an answer would get."""

from typing import Any

import pytest

from tests.api.conftest import Live
from tests.models import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo"}]


@pytest.mark.parametrize("text", ["", "Hi", "Héllo 🦜\n", "a" * 5000, "<|begin|>x<|end|>"], ids=ascii)
def test_a_prompt_is_tokenized_as_the_tokenizer_does(live: Live, text: str) -> None:
    for special in (True, False):
        answer = live.post("/tokenize", prompt=text, add_special_tokens=special).json()
        ids = TOKENIZER.encode(text, add_special_tokens=special)
        assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}


def test_the_tokens_by_name(live: Live) -> None:
    answer = live.post("/tokenize", prompt="<|begin|>é x", return_token_strs=True).json()
    assert answer["token_strs"] == ["<|begin|>", "Ã", "©", "Ġ", "x"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "messages": [*CONVERSATION, {"role": "assistant", "content": "Well,"}]},
        {"model": "first", "temperature": 0.5, "max_tokens": 3},
        {"adapter": [{"name": "first"}, "second"], "truncate_prompt_tokens": 3},
    ],
    ids=str,
)
def test_a_conversation_has_the_tokens_that_its_answer_is_asked_with(live: Live, fields: dict[str, Any]) -> None:
    body = {"messages": CONVERSATION, **fields}
    counted = live.post("/tokenize", **body).json()
    answer = live.post("/v1/chat/completions", **{**body, "return_token_ids": True, "max_tokens": 1}).json()
    assert counted["tokens"] == answer["prompt_token_ids"]
    assert counted["count"] == answer["usage"]["prompt_tokens"]


def test_there_and_back(live: Live) -> None:
    for text in ("", "Hi", "Héllo 🦜", "<|user|>x"):
        ids = live.post("/tokenize", prompt=text).json()["tokens"]
        assert live.post("/detokenize", tokens=ids).json() == {"prompt": text}
    assert live.post("/detokenize", tokens=[0xC3]).json()["prompt"]  # half a character is no failure


def test_what_a_client_without_the_tokenizer_must_know(live: Live) -> None:
    facts = live.http.get("/tokenizer_info").json()
    assert facts["bos_token"] == "<|begin|>"
    assert facts["eos_token"] == "<|end|>"
    assert facts["pad_token"] is None
    assert facts["additional_special_tokens"] == ["<|user|>", "<|assistant|>"]
    assert facts["model_max_length"] == 256
    assert facts["vocab_size"] == len(TOKENIZER)
    assert "add_generation_prompt" in facts["chat_template"]
    assert "/" not in facts["tokenizer_class"]  # nor any other place on this machine


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_the_model_must_be_served(live: Live, path: str) -> None:
    body: dict[str, Any] = {"prompt": "Hi"} if path == "/tokenize" else {"tokens": [65]}
    for model in ("tiny", "org/tiny", "first", None):
        assert live.post(path, model=model, **body).status_code == 200
    refused = live.post(path, model="nobody", **body)
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "nobody"},
        {"adapter": "nobody"},
        {"adapter": ["first", "nobody"]},
        {"adapter": "first", "model": "second"},
    ],
    ids=str,
)
def test_a_conversation_with_nobody_is_refused_as_a_chat_is(live: Live, fields: dict[str, Any]) -> None:
    body = {"messages": CONVERSATION, **fields}
    counted, asked = live.post("/tokenize", **body), live.post("/v1/chat/completions", **body)
    assert counted.status_code == (404 if "nobody" in str(fields) else 400)
    assert (counted.status_code, counted.json()) == (asked.status_code, asked.json())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "Hi", "messages": CONVERSATION}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CONVERSATION, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": CONVERSATION, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "Hi", "truncate": 4}, "truncate"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "Hi"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
    ids=ascii,
)
def test_what_cannot_be_tokenized_is_refused_by_name(live: Live, path: str, body: dict[str, Any], param: str) -> None:
    refused = live.post(path, **body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
