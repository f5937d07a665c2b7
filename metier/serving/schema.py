"""What a request may hold: OpenAI's fields, each taken, or refused by name.

In: a parsed JSON body. Out: `ChatRequest` or `CompletionRequest`, or `Invalid` with the sentence and the field. A
field that is known and not supported, an unknown field and a wrong value are all refused: nothing is ignored
but `user`, which only names the end user, and nulls. The default temperature is 0, since an adapter is
measured with greedy answers; OpenAI's is 1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from metier.errors import did_you_mean

# OpenAI's and other servers' fields that would change the answer, and that this server does not have.
_UNSUPPORTED = """
    audio best_of chat_template chat_template_kwargs add_generation_prompt continue_final_message documents
    function_call functions guided_choice guided_decoding_backend guided_grammar guided_json guided_regex ignore_eos
    include_stop_str_in_output length_penalty logits_processors max_completion_tokens messages metadata min_p
    min_tokens modalities moderation parallel_tool_calls prediction priority prompt_cache_key
    prompt_cache_retention prompt_logprobs reasoning reasoning_effort repetition_penalty safety_identifier
    service_tier skip_special_tokens spaces_between_special_tokens stop_token_ids store structured_outputs suffix
    tool_choice tools top_k truncate_prompt_tokens use_beam_search verbosity web_search_options
"""
UNSUPPORTED = frozenset(_UNSUPPORTED.split())
MAX_STOPS = 4
MAX_BIASES = 300
MAX_CHOICES = 8
MAX_PROMPTS = 64


class Invalid(Exception):
    """The request is wrong: `param` names the field."""

    def __init__(self, message: str, param: str | None = None, *, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class ResponseFormat(_Body):
    type: Literal["text"]


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """`content` may be a list of text parts, which are joined. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Request(_Body):
    model: str
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], max_length=512
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, float] = Field(default={}, max_length=MAX_BIASES)
    max_tokens: int | None = Field(default=None, ge=0)
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("logit_bias")
    @classmethod
    def _ids_and_range(cls, value: dict[str, float]) -> dict[str, float]:
        for key, bias in value.items():
            if not key.isascii() or not key.isdigit() or len(key) > 9:
                raise ValueError("its keys are token ids")
            if not -100 <= bias <= 100:
                raise ValueError("its values lie between -100 and 100")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> _Request:
        if len(self.stops) > MAX_STOPS:
            raise Invalid(f"`stop` holds {len(self.stops)} strings, and {MAX_STOPS} are the most", "stop")
        if self.stream_options is not None and not self.stream:
            raise Invalid("`stream_options` is only allowed with `stream`: true", "stream_options")
        return self


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens to tell with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise Invalid("`top_logprobs` is only allowed with `logprobs`: true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Invalid("`max_tokens` and `max_completion_tokens` say the same; give one", "max_tokens")
        if self.max_tokens == 0:
            raise Invalid("`max_tokens` is 0; expected at least 1", "max_tokens")
        if self.messages[-1].role == "assistant":
            raise Invalid("the last of `messages` is the assistant's; expected the user's", "messages")
        return self


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Request):
    """POST /v1/completions. A prompt is a text or token ids, or a list of either."""

    prompt: str | Ids | list[str] | list[Ids]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: Literal[1] | None = None

    @property
    def max_new_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else list(prompt)

    @model_validator(mode="after")
    def _completion(self) -> CompletionRequest:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise Invalid(f"`prompt` holds {len(self.prompts)} prompts; expected 1 to {MAX_PROMPTS}", "prompt")
        if self.max_tokens == 0 and not self.echo:
            raise Invalid("`max_tokens` is 0; expected at least 1 unless `echo` is true", "max_tokens")
        return self


class TokenizeRequest(_Body):
    """POST /tokenize: a text, or a conversation as it would be asked."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


AnyRequest = TypeVar("AnyRequest", bound=_Body)


def parse(kind: type[AnyRequest], body: Any) -> AnyRequest:
    """`body` as a request of `kind`. Raises `Invalid`."""
    if not isinstance(body, dict):
        raise Invalid("the body is no JSON object")
    given = {key: value for key, value in body.items() if value is not None}
    if isinstance(given.get("messages"), list):
        given["messages"] = [_without_nothing(message) for message in given["messages"]]
    known = list(kind.model_fields)
    for key in given:
        if key not in known:
            word = f"{key[:64]!r}"
            if key in UNSUPPORTED:
                raise Invalid(f"the field {word} is not supported by this server", key, code="unsupported_parameter")
            raise Invalid(f"unknown field {word}{did_you_mean(key[:64], known)}", key[:64], code="unknown_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None
    except RecursionError:
        raise Invalid("the body is nested too deeply") from None


def _without_nothing(message: Any) -> Any:
    """A message without the nulls and empty lists that clients send back from an earlier answer."""
    return {k: v for k, v in message.items() if v is not None and v != []} if isinstance(message, dict) else message


def _explained(error: ValidationError) -> Invalid:
    """The first thing that is wrong, without the value, which may be somebody's text."""
    errors = error.errors(include_url=False, include_input=False)
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    # Where a field may be of several types, pydantic tells of each; the field's name says enough.
    param = path[0] if path else None
    if path and path[0] == "messages" and len(path) > 1:
        param = f"messages[{path[1]}]" + (f".{path[2]}" if len(path) > 2 else "")
    same = [e for e in errors if str(e["loc"][0]) == (path[0] if path else "")]
    several = len(same) > 1 and path[0] in ("prompt", "stop")
    wants = {"prompt": "a string, token ids, or a list of either", "stop": f"1 to {MAX_STOPS} strings"}
    if first["type"] == "missing":
        return Invalid(f"`{param}` is missing", param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Invalid(f"`{param}` is not supported by this server", param, code="unsupported_parameter")
    what = f"expected {wants[path[0]]}" if several else first["msg"].removeprefix("Value error, ")
    return Invalid(f"`{param}`: {what}", param, code="invalid_value")
