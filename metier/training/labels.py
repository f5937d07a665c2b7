"""Records -> rendered records, and the proof that their labels are right before the first step.

The check does not trust the renderer: it decodes what would be trained and compares it with the
record's own answer. It blocks: a wrong label stops the run. Records that do not fit are counted, by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from metier.errors import ControlTokenError, LabelError
from metier.model.chat import IGNORE_INDEX, Message, Rendered, Renderer
from metier.recipe import TrainConfig


@dataclass
class LabelReport:
    """What became of the records: counts, and those that were cut or left out, by id.

    cut_prompts: how many tokens the record had too many, all of them the prompt's. left_out: the reason.
    """

    num_records: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    longest: int = 0
    cut_prompts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def render_records(
    record_ids: Sequence[str],
    conversations: Sequence[list[Message]],
    renderer: Renderer,
    config: TrainConfig,
    *,
    weights: Sequence[float] | None = None,
) -> tuple[list[Rendered], LabelReport]:
    """Renders every record, checks its labels, and reports what was cut or left out. `weights`: None is 1 for each.

    Raises `LabelError` when a label is wrong or no record is left.
    """
    report = LabelReport()
    rendered = []
    for record_id, messages, weight in zip(record_ids, conversations, weights or [1.0] * len(record_ids), strict=True):
        try:
            one = renderer.conversation(messages, config.train_on)
        except ControlTokenError as error:
            report.left_out[record_id] = error.message
            continue
        if one.num_tokens > config.max_seq_len:
            shorter = None
            if config.over_length == "cut_prompt":
                shorter = renderer.shorten(messages, config.max_seq_len, config.train_on)
            if shorter is None:
                report.left_out[record_id] = f"{one.num_tokens} tokens, above train.max_seq_len {config.max_seq_len}"
                continue
            whole, messages, one = one, shorter, renderer.conversation(shorter, config.train_on)
            report.cut_prompts[record_id] = whole.num_tokens - one.num_tokens
        check_labels(one, messages, renderer, config.train_on, record_id)
        rendered.append(one if weight == 1 else replace(one, weight=weight))
        report.num_records += 1
        report.num_tokens += one.num_tokens
        report.num_loss_tokens += one.num_loss_tokens
        report.longest = max(report.longest, one.num_tokens)
    if record_ids and not rendered:
        reason = next(iter(report.left_out.values()))
        raise LabelError(
            f"none of {len(record_ids)} records can be trained on; the first: {reason}",
            hint="raise `train.max_seq_len`, or use `train.over_length: cut_prompt`",
        )
    return rendered, report


def check_labels(
    rendered: Rendered, messages: list[Message], renderer: Renderer, train_on: str, record_id: str
) -> None:
    """Raises `LabelError` unless what is trained is exactly the record's answer and its stop token."""
    ids, labels = rendered.input_ids, rendered.labels
    trained = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    problem = None
    if len(ids) != len(labels) or any(labels[i] != ids[i] for i in trained):
        problem = "a label differs from its token"
    elif not trained:
        problem = "no token is trained"
    elif trained[0] == 0:
        problem = "the first token has nothing before it to be predicted from"
    elif ids[trained[-1]] not in renderer.stop_token_ids and train_on != "all_tokens":
        problem = "the stop token is not trained, so the model would not learn to end"
    elif _double_bos(ids, renderer):
        problem = "the beginning-of-sequence token is missing or stands twice"
    elif train_on != "all_tokens" and messages[0]["role"] != "text":
        problem = _wrong_answers(ids, trained, messages, renderer, train_on)
    if problem:
        raise LabelError(
            f"record {record_id}: {problem}",
            hint="`metier inspect` shows the record token by token; the base's chat template may be at fault",
        )


def _double_bos(ids: list[int], renderer: Renderer) -> bool:
    bos = renderer.tokenizer.bos_token_id
    if bos is None:
        return False
    return ids[:2] == [bos, bos] or (renderer.adds_bos and ids[0] != bos)


def _wrong_answers(
    ids: list[int], trained: list[int], messages: list[Message], renderer: Renderer, train_on: str
) -> str | None:
    """Each trained stretch must begin where generation would, decode to its answer, and end with a stop token."""
    stretches: list[list[int]] = []
    for position in trained:
        if not stretches or position != stretches[-1][-1] + 1:
            stretches.append([])
        stretches[-1].append(position)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if train_on == "last_assistant":
        turns = turns[-1:]
    if len(stretches) != len(turns):
        return f"{len(stretches)} stretches are trained, and the record has {len(turns)} answers to train"
    for stretch, turn in zip(stretches, turns, strict=True):
        if ids[: stretch[0]] != renderer.prompt(messages[:turn]):
            return "the tokens before an answer are not those that generation would start from"
        if ids[stretch[-1]] not in renderer.stop_token_ids:
            return "an answer's stop token is not trained"
        if renderer.decode([ids[i] for i in stretch]).strip() != messages[turn]["content"].strip():
            return "what would be trained is not the record's answer"
    return None
