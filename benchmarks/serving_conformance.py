"""The contract of an OpenAI-compatible server as cases against a live one: openai, langchain-openai, lm-eval, raw HTTP.

    metier serve red=runs/one blue=runs/two --precision fp32 &
    python benchmarks/serving_conformance.py http://127.0.0.1:8000 --base smollm2-135m --adapters red blue

Each case is a function that asserts; the table says which passed. `--control` runs the same cases against another
server with one model, such as `transformers serve` (an adapter's cases then ask the base). Needs openai,
langchain-openai and lm_eval; a case whose client is missing counts as failed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import re
import signal
import sys
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"


@dataclass
class Target:
    """A live server: its URL, its base model, its adapters, and the base's folder for a local tokenizer."""

    url: str
    base: str
    adapters: list[str]
    tokenizer: str
    key: str = "none"

    @property
    def one(self) -> str:
        return self.adapters[0]

    def openai(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key=self.key, max_retries=0, timeout=120)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        parts = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(method, path, data, {**sent, **{k.replace("_", "-"): v for k, v in headers.items()}})
        response = connection.getresponse()
        answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return answer

    def chat(self, **more: Any) -> Any:
        return self.openai().chat.completions.create(
            **{"model": self.one, "messages": QUESTION, "max_tokens": 8, "temperature": 0, **more}
        )

    def complete(self, **more: Any) -> Any:
        return self.openai().completions.create(
            **{"model": self.one, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **more}
        )

    def refused(
        self, param: str | None = None, path: str = "/v1/chat/completions", status: int = 400, **more: Any
    ) -> None:
        """The request gets `status` in OpenAI's shape, naming `param`."""
        start = {"messages": QUESTION} if "chat" in path else {"prompt": PROMPT}
        got, _, data = self.call("POST", path, {"model": self.one, **start, "max_tokens": 4, **more})
        assert got == status, f"status {got}"
        error = json.loads(data)["error"]
        assert error["message"] and (param is None or error["param"] == param), error


Case = tuple[str, str, Callable[[Target], None]]
CASES: list[Case] = []


def case(driver: str) -> Callable[[Callable[[Target], None]], Callable[[Target], None]]:
    """Registers a function as a case; its name is the claim."""

    def register(function: Callable[[Target], None]) -> Callable[[Target], None]:
        CASES.append((driver, function.__name__.replace("_", " "), function))
        return function

    return register


def text(answer: Any) -> str:
    return str(answer.choices[0].message.content)


# The openai client.


@case("openai")
def models_are_listed(t: Target) -> None:
    assert {m.id for m in t.openai().models.list().data} >= {t.base, *t.adapters}


@case("openai")
def a_model_can_be_retrieved(t: Target) -> None:
    assert t.openai().models.retrieve(t.one).id == t.one


@case("openai")
def an_adapter_names_its_parent(t: Target) -> None:
    assert t.openai().models.retrieve(t.one).parent == t.base


@case("openai")
def an_unknown_model_is_not_found(t: Target) -> None:
    import openai

    for call in (lambda: t.openai().models.retrieve("nobody"), lambda: t.chat(model="nobody")):
        try:
            call()
        except openai.NotFoundError as error:
            assert error.body and error.code == "model_not_found"
        else:
            raise AssertionError("it was found")


@case("openai")
def a_chat_is_answered(t: Target) -> None:
    answer = t.chat()
    assert text(answer) and answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"


@case("openai")
def the_answer_says_which_model(t: Target) -> None:
    assert t.chat(model=t.base).model == t.base and t.chat().model == t.one


@case("openai")
def base_and_adapter_answer_differently(t: Target) -> None:
    assert text(t.chat(model=t.base)) != text(t.chat(model=t.one))


@case("openai")
def usage_adds_up(t: Target) -> None:
    usage = t.chat().usage
    assert usage.prompt_tokens > 5 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@case("openai")
def the_fingerprint_is_steady_and_differs_by_model(t: Target) -> None:
    first, again, other = t.chat(), t.chat(), t.chat(model=t.base)
    assert first.system_fingerprint and first.system_fingerprint == again.system_fingerprint
    assert first.system_fingerprint != other.system_fingerprint


@case("openai")
def a_stream_equals_the_whole_answer(t: Target) -> None:
    chunks = list(t.chat(model=t.base, stream=True, max_tokens=16))
    joined = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(chunks) > 3 and joined == text(t.chat(model=t.base, max_tokens=16))


@case("openai")
def a_stream_has_usage_when_asked(t: Target) -> None:
    chunks = list(t.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == t.chat().usage


@case("openai")
def a_stream_has_no_usage_unasked(t: Target) -> None:
    assert all(c.usage is None and c.choices for c in t.chat(stream=True))


@case("openai")
def a_stream_starts_with_the_role_and_ends_with_a_reason(t: Target) -> None:
    chunks = list(t.chat(stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason in ("stop", "length")


@case("openai")
def a_stream_of_several_choices_interleaves(t: Target) -> None:
    seen = {c.choices[0].index for c in t.chat(stream=True, n=3, temperature=1, seed=1) if c.choices}
    assert seen == {0, 1, 2}


@case("openai")
def max_tokens_ends_with_length(t: Target) -> None:
    answer = t.chat(model=t.base, max_tokens=2)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2


@case("openai")
def max_completion_tokens_is_taken(t: Target) -> None:
    answer = t.openai().chat.completions.create(model=t.base, messages=QUESTION, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3


@case("openai")
def an_answer_that_ends_by_itself_says_stop(t: Target) -> None:
    assert t.chat(model=t.base, max_tokens=100).choices[0].finish_reason == "stop"


@case("openai")
def a_stop_string_is_cut_off(t: Target) -> None:
    answer = t.chat(model=t.base, stop=" of", max_tokens=20)
    assert " of" not in text(answer) and text(answer) and answer.choices[0].finish_reason == "stop"


@case("openai")
def four_stop_strings_are_taken_also_in_a_stream(t: Target) -> None:
    chunks = t.chat(model=t.base, stop=["zzz", "qqq", " of", "yyy"], max_tokens=20, stream=True)
    joined = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert joined and " of" not in joined


@case("openai")
def several_choices_are_given(t: Target) -> None:
    answer = t.chat(n=3, temperature=1.2, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2] and len({c.message.content for c in answer.choices}) > 1


@case("openai")
def a_seed_repeats(t: Target) -> None:
    first, again = (text(t.chat(model=t.base, temperature=1, seed=7, max_tokens=12)) for _ in range(2))
    assert first == again


@case("openai")
def another_seed_differs(t: Target) -> None:
    answers = {text(t.chat(model=t.base, temperature=1.5, seed=seed, max_tokens=12)) for seed in range(4)}
    assert len(answers) > 1


@case("openai")
def greedy_repeats(t: Target) -> None:
    assert text(t.chat()) == text(t.chat())


@case("openai")
def a_tiny_top_p_is_greedy(t: Target) -> None:
    assert text(t.chat(model=t.base, temperature=1, top_p=1e-6)) == text(t.chat(model=t.base))


@case("openai")
def chat_logprobs_are_given(t: Target) -> None:
    content = t.chat(logprobs=True, top_logprobs=5).choices[0].logprobs.content
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 5 and bytes(token.bytes).decode() == token.token
        assert token.logprob == token.top_logprobs[0].logprob


@case("openai")
def chat_logprobs_spell_the_answer(t: Target) -> None:
    answer = t.chat(model=t.base, logprobs=True)
    assert "".join(token.token for token in answer.choices[0].logprobs.content) == text(answer)


@case("openai")
def twenty_top_logprobs_are_given(t: Target) -> None:
    assert len(t.chat(logprobs=True, top_logprobs=20).choices[0].logprobs.content[0].top_logprobs) == 20


@case("openai")
def a_stream_carries_logprobs(t: Target) -> None:
    whole = t.chat(logprobs=True, top_logprobs=1).choices[0].logprobs.content
    chunks = [c.choices[0].logprobs for c in t.chat(logprobs=True, top_logprobs=1, stream=True)]
    streamed = [token for logprobs in chunks if logprobs for token in logprobs.content]
    assert [x.token for x in streamed] == [x.token for x in whole]
    assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(streamed, whole, strict=True))


@case("openai")
def logit_bias_forces_a_token(t: Target) -> None:
    [token] = json.loads(t.call("POST", "/tokenize", {"prompt": " blue", "add_special_tokens": False})[2])["tokens"]
    assert text(t.chat(logit_bias={str(token): 100}, max_tokens=2)) == " blue blue"


@case("openai")
def logit_bias_forbids_a_token(t: Target) -> None:
    first = t.chat(logprobs=True, top_logprobs=1).choices[0].logprobs.content[0].token
    ids = json.loads(t.call("POST", "/tokenize", {"prompt": first, "add_special_tokens": False})[2])["tokens"]
    assert not text(t.chat(logit_bias={str(ids[0]): -100})).startswith(first)


@case("openai")
def penalties_change_a_repeating_answer(t: Target) -> None:
    [token] = json.loads(t.call("POST", "/tokenize", {"prompt": " blue", "add_special_tokens": False})[2])["tokens"]
    bias = {str(token): 15}
    plain = text(t.chat(model=t.base, logit_bias=bias, max_tokens=24))
    varied = text(t.chat(model=t.base, logit_bias=bias, max_tokens=24, frequency_penalty=2, presence_penalty=2))
    assert plain.count("blue") > varied.count("blue")


@case("openai")
def content_parts_of_text_are_joined(t: Target) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    assert text(t.chat(messages=[{"role": "user", "content": parts}])) == text(t.chat())


@case("openai")
def system_and_developer_messages_are_the_same(t: Target) -> None:
    answers = [
        text(t.chat(model=t.base, messages=[{"role": role, "content": "Answer in one word."}, *QUESTION]))
        for role in ("system", "developer")
    ]
    assert answers[0] == answers[1]


@case("openai")
def an_earlier_answer_can_be_sent_back_as_it_came(t: Target) -> None:
    message = t.chat(model=t.base).choices[0].message
    assert text(t.chat(messages=[*QUESTION, message, {"role": "user", "content": "And of Spain?"}]))


@case("openai")
def response_format_text_and_user_are_taken(t: Target) -> None:
    assert text(t.chat(response_format={"type": "text"}, user="someone")) == text(t.chat())


@case("openai")
def chinese_goes_in_and_out(t: Target) -> None:
    answer = t.complete(model=t.base, prompt="北京是中国的首都。上海是中国", echo=True, max_tokens=4)
    assert (
        answer.choices[0].text.startswith("北京是中国的首都。上海是中国")
        and "\ufffd" not in answer.choices[0].text[:15]
    )


@case("openai")
def a_completion_is_given(t: Target) -> None:
    answer = t.complete(model=t.base)
    assert "Paris" in answer.choices[0].text and answer.object == "text_completion"


@case("openai")
def a_completion_takes_a_list_of_prompts(t: Target) -> None:
    answer = t.complete(model=t.base, prompt=[PROMPT, "One, two, three,"])
    assert [c.index for c in answer.choices] == [0, 1] and "Paris" in answer.choices[0].text


@case("openai")
def a_completion_takes_token_ids(t: Target) -> None:
    ids = json.loads(t.call("POST", "/tokenize", {"prompt": PROMPT})[2])["tokens"]
    for prompt in (ids, [ids, ids]):
        assert t.complete(model=t.base, prompt=prompt).choices[0].text == t.complete(model=t.base).choices[0].text


@case("openai")
def a_completion_streams(t: Target) -> None:
    joined = "".join(c.choices[0].text for c in t.complete(model=t.base, stream=True))
    assert joined == t.complete(model=t.base).choices[0].text


@case("openai")
def a_completion_gives_sixteen_tokens_by_default(t: Target) -> None:
    answer = t.openai().completions.create(model=t.base, prompt="Once upon a time", temperature=0)
    assert answer.usage.completion_tokens == 16


@case("openai")
def echo_with_logprobs_scores_the_prompt(t: Target) -> None:
    answer = t.complete(echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(PROMPT) and logprobs.token_logprobs[0] is None
    length = answer.usage.prompt_tokens
    assert len(logprobs.tokens) == length + 1 and all(x <= 0 for x in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens[:length]) == PROMPT and logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]


@case("openai")
def zero_new_tokens_with_echo_only_score(t: Target) -> None:
    answer = t.complete(echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == PROMPT and answer.usage.completion_tokens == 0


# Raw HTTP.


@case("http")
def a_stream_ends_with_done(t: Target) -> None:
    body = {"model": t.one, "messages": QUESTION, "max_tokens": 4, "stream": True}
    status, headers, data = t.call("POST", "/v1/chat/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert data.endswith(b"data: [DONE]\n\n")


@case("http")
def tools_are_refused_by_name(t: Target) -> None:
    t.refused("tools", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


@case("http")
def a_json_format_is_refused_by_name(t: Target) -> None:
    t.refused("response_format", response_format={"type": "json_object"})


@case("http")
def an_unknown_field_is_refused_by_name(t: Target) -> None:
    t.refused("temprature", temprature=1)


@case("http")
def an_image_is_refused(t: Target) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    t.refused(None, messages=[{"role": "user", "content": [part]}])


@case("http")
def five_stop_strings_are_refused(t: Target) -> None:
    t.refused("stop", stop=["a", "b", "c", "d", "e"])


@case("http")
def numbers_out_of_range_are_refused(t: Target) -> None:
    for param, value in (("temperature", 2.1), ("top_p", 0), ("n", 0), ("max_tokens", -1), ("presence_penalty", 3)):
        t.refused(param, **{param: value})


@case("http")
def wrong_types_are_refused(t: Target) -> None:
    for param, value in (("temperature", "hot"), ("stream", "yes"), ("messages", "hi"), ("seed", 1.5), ("stop", 3)):
        t.refused(param, **{param: value})


@case("http")
def too_many_top_logprobs_are_refused(t: Target) -> None:
    t.refused("top_logprobs", logprobs=True, top_logprobs=21)


@case("http")
def top_logprobs_without_logprobs_are_refused(t: Target) -> None:
    t.refused("top_logprobs", top_logprobs=2)


@case("http")
def a_missing_field_is_named(t: Target) -> None:
    for body, param in (({"model": t.one}, "messages"), ({"messages": QUESTION}, "model")):
        status, _, data = t.call("POST", "/v1/chat/completions", body)
        assert status == 400 and json.loads(data)["error"]["param"] == param


@case("http")
def no_messages_are_refused(t: Target) -> None:
    t.refused("messages", messages=[])


@case("http")
def too_long_a_prompt_is_refused_with_the_lengths(t: Target) -> None:
    status, _, data = t.call("POST", "/v1/completions", {"model": t.base, "prompt": "word " * 20_000, "max_tokens": 4})
    error = json.loads(data)["error"]
    assert (
        status == 400
        and error["code"] == "context_length_exceeded"
        and len(re.findall(r"\d{4,}", error["message"])) > 1
    )


@case("http")
def a_body_that_is_no_json_is_refused(t: Target) -> None:
    for body in (b"{", b"[1", b"\xff", b"null"):
        status, _, data = t.call("POST", "/v1/chat/completions", body)
        assert status == 400 and json.loads(data)["error"]["message"]


@case("http")
def a_huge_body_is_refused(t: Target) -> None:
    status, _, _ = t.call("POST", "/v1/chat/completions", b'{"a": "' + b"x" * (2**20 + 1) + b'"}')
    assert status == 413


@case("http")
def an_unknown_route_is_an_error_object(t: Target) -> None:
    status, _, data = t.call("GET", "/v1/nothing")
    assert status == 404 and json.loads(data)["error"]["message"]


@case("http")
def there_is_no_management_route(t: Target) -> None:
    for path in ("/load_model", "/reset", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/docs", "/openapi.json"):
        assert t.call("POST", path, {})[0] in (404, 405) and t.call("GET", path)[0] in (404, 405), path


@case("http")
def other_origins_and_hosts_are_refused(t: Target) -> None:
    assert t.call("GET", "/v1/models", Origin="http://evil.example")[0] == 403
    assert t.call("GET", "/v1/models", Host="evil.example")[0] == 403
    assert not any(h.startswith("access-control") for h in t.call("GET", "/v1/models")[1])


@case("http")
def a_doubled_slash_is_tolerated(t: Target) -> None:
    assert t.call("GET", "/v1//models")[0] == 200


@case("http")
def a_request_id_comes_back(t: Target) -> None:
    assert t.call("GET", "/v1/models", X_Request_Id="abc-1")[1]["x-request-id"] == "abc-1"
    assert t.call("GET", "/v1/models")[1]["x-request-id"]


@case("http")
def health_and_metrics_are_there(t: Target) -> None:
    assert t.call("GET", "/health")[0] == 200
    status, headers, data = t.call("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain") and b"# TYPE" in data


@case("http")
def the_tokenizer_can_be_asked(t: Target) -> None:
    ids = json.loads(t.call("POST", "/tokenize", {"prompt": PROMPT, "add_special_tokens": False})[2])["tokens"]
    assert json.loads(t.call("POST", "/detokenize", {"tokens": ids})[2])["prompt"] == PROMPT
    assert json.loads(t.call("GET", "/tokenizer_info")[2])["eos_token"]


@case("http")
def the_guard_is_told_with_every_answer(t: Target) -> None:
    body = {"model": t.one, "messages": QUESTION, "max_tokens": 2}
    answer = json.loads(t.call("POST", "/v1/chat/completions", body)[2])
    assert set(answer["metier"]["guard"][0]) == {"index", "redacted", "notice", "refused"}


# langchain-openai.


def langchain(t: Target, **more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    settings = {"model": t.base, "max_tokens": 12, "temperature": 0, "max_retries": 0, **more}
    return ChatOpenAI(base_url=t.url + "/v1", api_key=t.key, **settings)


@case("langchain")
def langchain_invokes(t: Target) -> None:
    answer = langchain(t).invoke("What is the capital of France?")
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0


@case("langchain")
def langchain_streams_with_usage(t: Target) -> None:
    pieces = list(langchain(t, stream_usage=True).stream("What is the capital of France?"))
    assert "Paris" in "".join(p.content for p in pieces) and any(p.usage_metadata for p in pieces)


@case("langchain")
def langchain_batches(t: Target) -> None:
    answers = langchain(t).batch(["Say yes.", "What is the capital of France?"])
    assert len(answers) == 2 and "Paris" in answers[1].content


@case("langchain")
def langchain_gets_logprobs_and_choices(t: Target) -> None:
    bound = langchain(t, n=2, seed=3).bind(logprobs=True, top_logprobs=2)
    result = bound.invoke("What is the capital of France?")
    assert len(result.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


# lm-eval.


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def lm_eval_model(t: Target, kind: str, **more: Any) -> Any:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    os.environ.setdefault("OPENAI_API_KEY", t.key)
    chosen = {"completions": LocalCompletionsAPI, "chat/completions": LocalChatCompletion}[kind]
    settings = {"tokenizer": t.tokenizer, "tokenizer_backend": "huggingface", **more}
    return chosen(base_url=f"{t.url}/v1/{kind}", model=t.base, num_concurrent=1, max_retries=1, **settings)


PAIRS = [
    (PROMPT, " Paris"),
    (PROMPT, " a large green cat"),
    ("Water boils at", " 100 degrees"),
    ("北京是", "中国的首都"),
]


@case("lm-eval")
def lm_eval_scores_by_log_likelihood(t: Target) -> None:
    scores = lm_eval_model(t, "completions").loglikelihood(requests_of("loglikelihood", PAIRS))
    assert all(math.isfinite(s) and s < 0 for s, _ in scores) and scores[0][0] > scores[1][0] and scores[0][1]


@case("lm-eval")
def lm_eval_scores_with_the_servers_own_tokenizer(t: Target) -> None:
    remote = lm_eval_model(t, "completions", tokenizer_backend="remote", tokenizer=None)
    local = lm_eval_model(t, "completions")
    wanted = local.loglikelihood(requests_of("loglikelihood", PAIRS[:2]))
    found = remote.loglikelihood(requests_of("loglikelihood", PAIRS[:2]))
    assert [round(s, 3) for s, _ in found] == [round(s, 3) for s, _ in wanted]


@case("lm-eval")
def lm_eval_generates_until_a_stop(t: Target) -> None:
    wanted = {"until": ["\n", "."], "max_gen_toks": 12}
    [answer] = lm_eval_model(t, "completions").generate_until(requests_of("generate_until", [(PROMPT, wanted)]))
    assert "Paris" in answer and "." not in answer


@case("lm-eval")
def lm_eval_generates_in_chats(t: Target) -> None:
    from lm_eval.models.api_models import JsonChatStr

    model = lm_eval_model(t, "chat/completions", tokenized_requests=False)
    prompt = JsonChatStr(json.dumps(QUESTION))
    wanted = {"until": ["\n"], "max_gen_toks": 16}
    [answer] = model.generate_until(requests_of("generate_until", [(prompt, wanted)]))
    assert "Paris" in answer


def run_cases(target: Target, only: str = "", seconds: float = 0.0) -> list[dict[str, str]]:
    """Each case's driver, name and what went wrong (empty when nothing did); `only` is a part of "client name".

    A case that takes longer than `seconds` (0: no limit; main thread only) is wrong.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    if seconds:
        signal.signal(signal.SIGALRM, late)
    results = []
    for driver, name, function in CASES:
        if only not in f"{driver} {name}":
            continue
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 5.0 if seconds else 0.0)
            function(target)
            wrong = ""
        # A client's own errors are what a failed case looks like.
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        results.append({"driver": driver, "case": name, "wrong": wrong})
        print(f"{'ok  ' if not wrong else 'FAIL'} {driver:10} {name} {wrong}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", nargs="+")
    parser.add_argument("--tokenizer", required=True, help="the base's folder")
    parser.add_argument("--control", action="store_true", help="one model alone: adapters' cases ask the base")
    parser.add_argument("--only", default="", help="run the cases whose client and name hold this")
    parser.add_argument("--seconds", type=float, default=0.0, help="a case that takes longer fails (0: no limit)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    adapters = args.adapters or ([args.base] if args.control else parser.error("name the adapters"))
    results = run_cases(Target(args.url.rstrip("/"), args.base, adapters, args.tokenizer), args.only, args.seconds)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    passed = sum(not r["wrong"] for r in results)
    print(f"{passed} of {len(results)} cases pass")
    sys.exit(0 if args.control or passed == len(results) else 1)


if __name__ == "__main__":
    main()
