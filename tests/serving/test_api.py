"""Tries to get past the contract over real HTTP: wrong fields, sizes and keys, guarded answers, lost clients."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import pytest

from metier.serving.models import Models
from metier.serving.server import Server, ServerSettings
from tests.serving.conftest import Client

MESSAGES = [{"role": "user", "content": "Hello"}]


def error_of(answer: tuple[int, Any]) -> tuple[int, str | None]:
    """Status and param of an error in OpenAI's shape."""
    status, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    return status, body["error"]["param"]


def test_models_are_listed_with_their_parent(client: Client) -> None:
    for path in ("/v1/models", "/v1//models"):
        status, _, data = client.call("GET", path)
        listed = json.loads(data)["data"]
        assert status == 200 and [m["id"] for m in listed] == ["base", "red", "blue"]
        assert [m["parent"] for m in listed] == [None, "base", "base"]
    assert len({m["system_fingerprint"] for m in listed}) == 3
    assert client.call("GET", "/v1/models/red")[0] == 200
    status, _, data = client.call("GET", "/v1/models/rad")
    assert status == 404 and "did you mean `red`" in json.loads(data)["error"]["message"]


def test_a_chat_answer_has_openais_shape_and_says_what_served_it(client: Client, models: Models) -> None:
    status, body = client.chat()
    assert status == 200 and body["object"] == "chat.completion" and body["model"] == "red"
    assert body["system_fingerprint"] == models.by_name["red"].fingerprint
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["completion_tokens"] <= 8 and usage["total_tokens"] == sum(usage.values()) // 2
    assert body["metier"]["guard"] == [{"index": 0, "redacted": {}, "notice": None, "refused": None}]


def test_a_stream_says_what_the_whole_answer_says(client: Client) -> None:
    _, whole = client.chat(max_tokens=12)
    request = {"model": "red", "messages": MESSAGES, "max_tokens": 12}
    events = client.stream("/v1/chat/completions", **request, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]" and events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]
    choices = [c for e in events[:-1] for c in e["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(c["delta"].get("content", "") for c in choices) == whole["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [whole["choices"][0]["finish_reason"]]
    without = client.stream("/v1/chat/completions", **request)
    assert without[-1] == "[DONE]" and all("usage" not in e for e in without[:-1])


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": []}, "tools"),
        ({"top_k": 5}, "top_k"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperatur": 0}, "temperatur"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 65}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a <|im_end|> b"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_or_unsupported_is_refused_by_name(client: Client, wrong: dict[str, Any], param: str) -> None:
    body = {"model": "red", "messages": MESSAGES, "max_tokens": 4, **wrong}
    assert error_of(client.post("/v1/chat/completions", **body)) == (400, param)


def test_a_long_prompt_is_refused_with_the_lengths(client: Client) -> None:
    status, body = client.post("/v1/completions", model="red", prompt=[5] * 510, max_tokens=10)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert "510" in body["error"]["message"] and "512" in body["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"model": "\\ud800"}',
     b"1e999999", b'{"model": {"a": 1}}', b'{"seed": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_a_body_that_is_no_request_gets_a_400(client: Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        status, _, data = client.call("POST", path, body)
        assert status == 400 and json.loads(data)["error"]["message"]


def test_completions_take_texts_and_ids_one_or_many(client: Client) -> None:
    ids = client.post("/tokenize", prompt="Hello there")[1]["tokens"]
    answers = {}
    for name, prompt in {"text": "Hello there", "texts": ["Hello there"] * 2, "ids": ids, "lists": [ids, ids]}.items():
        status, body = client.post("/v1/completions", model="red", prompt=prompt, max_tokens=6)
        assert status == 200
        answers[name] = [c["text"] for c in body["choices"]]
    assert answers["text"] * 2 == answers["texts"] == answers["ids"] * 2 == answers["lists"]
    assert client.post("/detokenize", tokens=ids)[1]["prompt"] == "Hello there"


def test_echoed_log_probabilities_align_with_the_tokens(client: Client) -> None:
    request = {"model": "red", "prompt": "Hello there", "max_tokens": 3, "logprobs": 2, "echo": True}
    _, body = client.post("/v1/completions", **request)
    found = body["choices"][0]["logprobs"]
    length = body["usage"]["prompt_tokens"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == length + body["usage"]["completion_tokens"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert "".join(found["tokens"][:length]) == "Hello there"
    for value, top in zip(found["token_logprobs"][length:], found["top_logprobs"][length:], strict=True):
        assert value == max(top.values())
    _, scored = client.post("/v1/completions", **{**request, "max_tokens": 0})
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][:length]
    assert scored["choices"][0]["text"] == "Hello there"


def test_stop_strings_seeds_biases_and_choices_do_what_they_say(client: Client) -> None:
    _, plain = client.chat(max_tokens=24)
    text = plain["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    _, cut = client.chat(max_tokens=24, stop=stop)
    assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    hot = {"temperature": 1.5, "seed": 4, "n": 3, "max_tokens": 10}
    first, again = client.chat(**hot)[1], client.chat(**hot)[1]
    texts = [c["message"]["content"] for c in first["choices"]]
    assert len(set(texts)) > 1 and texts == [c["message"]["content"] for c in again["choices"]]
    assert first["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    [token] = client.post("/tokenize", prompt="x", add_special_tokens=False)[1]["tokens"]
    _, biased = client.chat(logit_bias={str(token): 100}, max_tokens=4)
    assert biased["choices"][0]["message"]["content"] == "xxxx"
    _, varied = client.chat(logit_bias={str(token): 15}, frequency_penalty=2, presence_penalty=2, max_tokens=40)
    assert varied["choices"][0]["message"]["content"].count("x") < 40


def test_a_red_line_is_refused_in_its_language_and_told(client: Client) -> None:
    for asked, said in (("Which poison is best?", "I cannot help with this."), ("如何下毒？", "我不能协助处理。")):
        _, body = client.chat(asked, model="blue")
        assert body["choices"][0]["message"]["content"] == said
        assert body["choices"][0]["finish_reason"] == "content_filter"
        assert body["metier"]["guard"][0]["refused"] == "medicine" and body["usage"]["completion_tokens"] == 0
        events = client.stream("/v1/chat/completions", model="blue", messages=[{"role": "user", "content": asked}])
        assert "".join(c["delta"].get("content", "") for e in events[:-1] for c in e["choices"]) == said
    assert client.chat("Which poison is best?", model="red")[1]["metier"]["guard"][0]["refused"] is None


def test_personal_data_and_the_notice_are_told_in_answer_and_stream(client: Client) -> None:
    [seven] = client.post("/tokenize", prompt="7", add_special_tokens=False)[1]["tokens"]
    request = {"model": "blue", "logit_bias": {str(seven): 100}, "max_tokens": 3}
    _, body = client.chat("Hello", **request, logprobs=True)
    text = body["choices"][0]["message"]["content"]
    assert text == "[DIGIT][DIGIT][DIGIT]\n\nNo medical advice." and body["choices"][0]["logprobs"] is None
    acts = {"index": 0, "redacted": {"DIGIT": 3}, "notice": "medicine", "refused": None}
    assert body["metier"]["guard"] == [acts]
    events = client.stream("/v1/chat/completions", messages=MESSAGES, **request)
    assert "".join(c["delta"].get("content", "") for e in events[:-1] for c in e["choices"]) == text
    assert [e["metier"]["guard"] for e in events[:-1] if "metier" in e] == [[acts]]
    refused = client.post("/v1/chat/completions", messages=MESSAGES, **request, logprobs=True, stream=True)
    assert error_of(refused) == (400, "logprobs")


def test_other_hosts_origins_kinds_and_routes_are_refused(client: Client) -> None:
    assert client.call("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 403
    assert client.call("GET", "/v1/models", headers={"Origin": "http://evil.example"})[0] == 403
    assert client.call("GET", "/v1/models", headers={"Origin": f"http://{client.host}"})[0] == 200
    assert client.call("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    for path in ("/docs", "/openapi.json", "/v1/load_lora_adapter", "/reset", "/load_model", "/v1/files"):
        status, headers, data = client.call("GET", path)
        assert status == 404 and json.loads(data)["error"]["message"]
        assert "access-control-allow-origin" not in headers
    assert client.call("GET", "/v1/completions")[0] == 405
    assert client.call("OPTIONS", "/v1/completions", headers={"Origin": "http://evil.example"})[0] == 403


def test_a_body_over_the_cap_is_refused_before_it_is_read(client: Client) -> None:
    with socket.create_connection((client.host.split(":")[0], int(client.host.split(":")[1])), timeout=10) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {client.host}\r\nContent-Length: 99999999999\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(64).startswith(b"HTTP/1.1 413")
    status, _, _ = client.call("POST", "/v1/completions", b'{"prompt": "' + b"a" * 2**20 + b'"}')
    assert status == 413


def test_a_client_that_hangs_up_frees_its_row(server: Server, client: Client) -> None:
    for stream in (True, False):
        body = {"model": "red", "messages": MESSAGES, "max_tokens": 64, "stream": stream, "logit_bias": {"0": -100}}
        connection = http.client.HTTPConnection(client.host, timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(0.05)
        connection.close()
    deadline = time.monotonic() + 10
    while server.engine.num_running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.num_running == 0
    assert client.chat()[0] == 200


def test_a_crash_is_a_503_or_an_error_event_and_then_it_works_again(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boom(rows: Any) -> None:
        raise RuntimeError

    before = client.chat()[1]["choices"]
    with monkeypatch.context() as patch:
        patch.setattr(server.engine.bank, "select", boom)
        status, body = client.chat()
        assert status == 503 and body["error"]["code"] == "crash"
        events = client.stream("/v1/chat/completions", model="red", messages=MESSAGES)
        assert events[-2]["error"]["code"] == "crash" and events[-1] == "[DONE]"
    assert client.chat()[1]["choices"] == before
    assert b"metier_engine_crashes 2" in client.call("GET", "/metrics")[2]


def test_operators_see_numbers_and_no_text(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    secret = "zanzibar"
    client.chat(secret)
    client.call("GET", f"/v1/models/{secret}?q={secret}")
    status, headers, data = client.call("GET", "/metrics", headers={"X-Request-Id": "trace-1"})
    assert status == 200 and headers["x-request-id"] == "trace-1"
    assert b'metier_requests_total{route="/v1/chat/completions",status="200"}' in data
    assert "metier.access" in caplog.text and secret not in caplog.text and secret.encode() not in data
    assert client.call("GET", "/health")[0] == 200
    assert json.loads(client.call("GET", "/tokenizer_info")[2])["eos_token"] == "<|im_end|>"


def test_every_route_but_page_and_health_needs_the_key(models: Models) -> None:
    key = "k" * 32
    server = Server(models, ServerSettings(port=0, api_keys=("other-key-of-sixteen", key))).start()
    client = Client(server.url)
    try:
        routes = [("GET", p) for p in ("/metrics", "/v1/models", "/v1/models/red", "/tokenizer_info", "/docs")]
        routes += [("POST", p) for p in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")]
        for method, path in routes:
            for wrong in ({}, {"Authorization": "Bearer " + "x" * 32}, {"Authorization": f"Basic {key}"}):
                assert client.call(method, path, b"{}" if method == "POST" else None, wrong)[0] == 401
        assert client.call("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
        assert client.call("GET", "/")[0] == client.call("GET", "/health")[0] == 200
    finally:
        server.stop()
        server.wait()


def test_a_stopping_server_finishes_what_it_began(models: Models) -> None:
    server = Server(models, ServerSettings(port=0)).start()
    client = Client(server.url)
    body = {"model": "red", "messages": MESSAGES, "max_tokens": 200, "stream": True, "logit_bias": {"0": -100}}
    connection = http.client.HTTPConnection(client.host, timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    server.stop()
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    server.wait()
    with pytest.raises(OSError):
        client.chat()


def test_the_page_holds_all_it_needs(client: Client) -> None:
    _, headers, data = client.call("GET", "/")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in data and b"https://" not in data and b"innerHTML" not in data
    for word in ("Ask both", "同时提问"):
        assert word.encode() in data
