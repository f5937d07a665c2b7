"""Tries to get a mistake past the recipe: a typo, a wrong type, a value that YAML reads otherwise, a lost override."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from metier.errors import MetierError, RecipeError
from metier.recipe import CLASSIC, Recipe, load_recipe, parse_recipe

MINIMAL = "base: smollm2-135m\nout: runs/x\ndata:\n  sources: [a.csv]\n"


def recipe_from(extra: str = "", *overrides: str, folder: Path = Path("/recipes")) -> Recipe:
    return parse_recipe(MINIMAL + extra, name="r.yaml", folder=folder, overrides=list(overrides))


def message_of(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="r.yaml", folder=Path("/recipes"), overrides=list(overrides))
    assert caught.value.exit_code == 2
    return caught.value.message


def test_three_keys_make_a_recipe() -> None:
    recipe = recipe_from()
    assert (recipe.base, recipe.out, recipe.seed, recipe.preset) == ("smollm2-135m", "runs/x", 0, "default")


def test_the_default_is_all_linear_rank_16() -> None:
    adapter, train = recipe_from().adapter, recipe_from().train
    assert (adapter.rank, adapter.alpha, adapter.target_modules, adapter.dropout) == (16, 32, "all-linear", 0)
    assert (adapter.bias, adapter.use_rslora) == ("none", False)
    assert (train.learning_rate, train.min_learning_rate, train.train_on) == ("auto", 0, "last_assistant")


def test_classic_is_the_tutorial_value_for_value() -> None:
    recipe = recipe_from("preset: classic\n")
    assert recipe.adapter.model_dump() == {
        "rank": 8,
        "alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "dropout": 0.05,
        "bias": "none",
        "use_rslora": False,
    }
    train = recipe.train
    assert (train.micro_batch_size, train.grad_accum_steps, train.epochs) == (4, 4, 3)
    assert (train.learning_rate, train.min_learning_rate, train.max_seq_len) == (2e-4, 0.0, 512)
    assert (train.log_every, train.save_every) == (50, 500)
    assert train.precision == "auto"


def test_what_the_recipe_states_wins_over_the_preset() -> None:
    recipe = recipe_from("preset: classic\nadapter: {rank: 64}\n", "train.epochs=1")
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.train.epochs) == (64, 16, 1)


def test_an_override_can_choose_the_preset() -> None:
    assert recipe_from("", "preset=classic").adapter.rank == 8


def test_the_preset_itself_is_never_changed_by_a_recipe() -> None:
    before = repr(CLASSIC)
    recipe_from("preset: classic\nadapter: {rank: 64, target_modules: [o_proj]}\n", "train.epochs=1")
    assert repr(CLASSIC) == before


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "2.e-4", "0.0002", "+2e-4"])
def test_a_float_may_be_written_as_yaml_1_2_allows(text: str) -> None:
    assert recipe_from(f"train: {{learning_rate: {text}}}\n").train.learning_rate == 2e-4
    assert recipe_from("", f"train.learning_rate={text}").train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("adapter: {rnak: 8}", "line 5: unknown key `adapter.rnak` (did you mean `rank`?); known here: rank, alpha"),
        ("adapter:\n  alpha: 4\n  dropot: 0.1", "line 7: unknown key `adapter.dropot` (did you mean `dropout`?)"),
        ("Train: {}", "line 5: unknown key `Train` (did you mean `train`?)"),
        ("xyzzy: 1", "line 5: unknown key `xyzzy`; known here: base, "),
        ("adapter:\n  rank: 0", "line 6: `adapter.rank` is 0; should be greater than or equal to 1"),
        ("adapter:\n  rank: 1.5", "line 6: `adapter.rank` is 1.5; should be a valid integer"),
        ("adapter:\n  rank: '8'", "line 6: `adapter.rank` is '8'; should be a valid integer"),
        ("adapter:\n  rank: true", "line 6: `adapter.rank` is True; should be a valid integer"),
        ("adapter:\n  rank:", "line 6: `adapter.rank` is None; should be a valid integer"),
        ("adapter: 7", "line 5: `adapter` is 7; should be a valid dictionary"),
        ("adapter: {alpha: -1}", "`adapter.alpha` is -1; should be greater than 0"),
        ("adapter: {dropout: 1}", "`adapter.dropout` is 1; should be less than 1"),
        ("adapter: {bias: yes}", "`adapter.bias` is True; should be 'none', 'all' or 'lora_only'"),
        ("adapter: {target_modules: []}", "`adapter.target_modules` is []; value should have at least 1 item"),
        ("adapter: {target_modules: [q_proj, 3]}", "`adapter.target_modules.1` is 3; should be a valid string"),
        ("train: {epochs: .nan}", "`train.epochs` is nan; should be a finite number"),
        ("train: {epochs: .inf}", "`train.epochs` is inf; should be a finite number"),
        ("train: {epochs: three}", "`train.epochs` is 'three'; should be a valid number"),
        ("train: {learning_rate: 0}", "`train.learning_rate` is 0; should be greater than 0"),
        ("train: {device: gpu}", "`train.device` is 'gpu'; should be 'auto', 'cpu' or 'cuda'"),
        ("train: {report_to: [mlflow]}", "`train.report_to.0` is 'mlflow'; should be 'tensorboard' or 'wandb'"),
        ("evaluate: {tasks: [generation, bleu]}", "`evaluate.tasks.1` is 'bleu'; should be 'classification', "),
        ("evaluate: {bootstrap_samples: 5}", "`evaluate.bootstrap_samples` is 5; should be greater than or equal"),
        ("seed: -1", "`seed` is -1; should be greater than or equal to 0"),
        ("seed: 2024-01-01", "`seed` is datetime.date(2024, 1, 1); should be a valid integer"),
        ("preset: clasic", "`preset` is 'clasic'; should be 'default' or 'classic'"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_was_expected(extra: str, expected: str) -> None:
    assert expected in message_of(MINIMAL + extra + "\n")


def test_a_union_makes_one_sentence_of_its_complaints() -> None:
    message = message_of(MINIMAL + "train: {learning_rate: fast}\n")
    assert message == "r.yaml, line 5: `train.learning_rate` is 'fast'; should be a valid number, or should be 'auto'"


def test_a_wrong_part_of_a_list_does_not_blame_the_whole_list() -> None:
    assert "\n" not in message_of(MINIMAL + "evaluate: {tasks: [generation, bleu]}\n")


def test_every_mistake_is_told_at_once() -> None:
    lines = message_of("base: 3\nout: x\ndata: {sources: a.csv}\nadapter: {rank: 0}\n").splitlines()
    assert [line.split("`")[1] for line in lines] == ["base", "data.sources", "adapter.rank"]


@pytest.mark.parametrize("key", ["base", "out", "data"])
def test_a_key_without_default_is_missed_by_name(key: str) -> None:
    values = {k: v for k, v in yaml.safe_load(MINIMAL).items() if k != key}
    assert message_of(yaml.safe_dump(values)) == f"r.yaml: `{key}` is missing; it has no default"


@pytest.mark.parametrize(
    ("value", "kept"), [("0.2", 0.2), ("200", 200), ("0", 0), ("1", 1)], ids=["share", "count", "none", "one"]
)
def test_a_split_is_a_share_or_a_number_of_records(value: str, kept: float) -> None:
    recipe = recipe_from("", f"data.val={value}")
    assert recipe.data.val == kept
    assert type(recipe.data.val) is type(kept)


@pytest.mark.parametrize("value", ["1.0", "0.0", "-0.1", "-1", "half", "true"])
def test_a_split_that_is_neither_is_refused(value: str) -> None:
    assert f"`--set data.val={value}`: `data.val` is " in message_of(MINIMAL, f"data.val={value}")


@pytest.mark.parametrize(
    "keys", ["messages: m, text: t", "messages: m, prompt: p", "text: t, answer: a"], ids=["two", "chat", "text"]
)
def test_two_kinds_of_record_at_once_are_refused(keys: str) -> None:
    text = MINIMAL.replace("data:\n  sources: [a.csv]", f"data: {{sources: [a.csv], {keys}}}")
    assert "not several of them" in message_of(text)


def test_a_cosine_that_would_rise_is_refused() -> None:
    text = "train: {learning_rate: 1e-5, min_learning_rate: 1e-3}\n"
    assert "min_learning_rate is above train.learning_rate" in message_of(MINIMAL + text)


def test_a_key_that_stands_twice_is_refused_with_both_lines() -> None:
    message = message_of(MINIMAL + "adapter:\n  rank: 4\n  rank: 8\n")
    assert message == "r.yaml, line 7: not valid YAML: `rank` stands on line 6 already"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no recipe"),
        ("- a\n- b\n", "holds no recipe"),
        ("just words\n", "holds no recipe"),
        (MINIMAL + "adapter: {rank: 4\n", "not valid YAML"),
        ("base: x\n\tout: y\n", "line 2: not valid YAML: found character '\\t'"),
        ("base: x\n---\nbase: y\n", "line 2: not valid YAML"),
        (MINIMAL + "x: *nothing\n", "line 5: not valid YAML: found undefined alias"),
        (MINIMAL + "? [a, b]\n: 3\n", "line 5: not valid YAML"),
        (MINIMAL + "x: !!python/object/apply:os.system [ls]\n", "line 5: not valid YAML: could not determine"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_recipe_at_all_gets_a_sentence(text: str, expected: str) -> None:
    assert expected in message_of(text)


def test_an_override_replaces_adds_and_opens_a_section() -> None:
    recipe = recipe_from("adapter: {rank: 4}\n", "adapter.rank=8", "train.epochs=1", "adapter.target_modules=[q_proj]")
    assert (recipe.adapter.rank, recipe.train.epochs, recipe.adapter.target_modules) == (8, 1, ["q_proj"])


def test_the_last_of_two_overrides_holds() -> None:
    assert recipe_from("", "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rnak=3", "`--set adapter.rnak=3`: unknown key `adapter.rnak` (did you mean `rank`?)"),
        ("adapter.rank=", "`--set adapter.rank=`: `adapter.rank` is None; should be a valid integer"),
        ("adapter.rank=[", "`--set adapter.rank=[`: `adapter.rank` is '['; should be a valid integer"),
        ("adapter.rank.x=3", "`--set adapter.rank.x=3`: `adapter.rank` is {'x': 3}; should be a valid integer"),
        ("base.x=3", "`--set base.x=3`: `base` is a value, not a section"),
        ("adapter.rank", "expected key=value, such as `--set train.epochs=1`"),
        ("=3", "expected key=value"),
        ("train.epohcs=3", "`--set train.epohcs=3`: unknown key `train.epohcs` (did you mean `epochs`?)"),
    ],
)
def test_a_wrong_override_is_named_itself(override: str, expected: str) -> None:
    assert expected in message_of(MINIMAL, override)


@pytest.mark.parametrize("template", ["{text}", "Classify: {text}", "分析股票走势:{text}", "Q: {a} A:", "a = {b}"])
def test_a_template_can_be_set_without_quoting_for_yaml(template: str) -> None:
    assert recipe_from("", f"data.prompt={template}").data.prompt == template


def test_out_given_by_itself_wins() -> None:
    text = MINIMAL
    assert parse_recipe(text, name="r", folder=Path("."), overrides=["out=a"], out="b").out == "b"


def test_reading_back_what_was_written_gives_the_same_recipe(tmp_path: Path) -> None:
    text = (
        "preset: classic\nseed: 7\nadapter: {target_modules: [q_proj, o_proj]}\n"
        "train: {learning_rate: 3e-5, report_to: [tensorboard]}\nevaluate: {tasks: [generation], max_items: 3}\n"
    )
    recipe = recipe_from(text, "data.prompt=判断科室：{条文}", "data.val=200", folder=tmp_path)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_a_resolved_recipe_spells_out_every_field(tmp_path: Path) -> None:
    def names(model: Any) -> set[str]:
        fields = model.model_fields.items()
        return {n for n, _ in fields} | {
            f"{n}.{m}" for n, f in fields for m in getattr(f.annotation, "model_fields", {})
        }

    written = yaml.safe_load(recipe_from().to_yaml())
    assert set(written) | {f"{k}.{m}" for k, v in written.items() if isinstance(v, dict) for m in v} == names(Recipe)


def test_sources_lie_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    text = "base: b\nout: o\ndata: {sources: [a.csv, sub/*.json, /abs/c.csv, ~/d.csv], test_sources: [t.csv]}\n"
    data = parse_recipe(text, name="r", folder=tmp_path).data
    assert data.sources == [f"{tmp_path}/a.csv", f"{tmp_path}/sub/*.json", "/abs/c.csv", "/home/somebody/d.csv"]
    assert data.test_sources == [f"{tmp_path}/t.csv"]


def test_a_base_is_a_path_only_where_it_looks_like_one_or_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    def base(value: str) -> str:
        return recipe_from("", f"base={value}", folder=tmp_path).base

    assert base("smollm2-135m") == "smollm2-135m"
    assert base("meta-llama/Llama-2-7b-chat-hf") == "meta-llama/Llama-2-7b-chat-hf"
    assert base("mine") == str(tmp_path / "mine")
    assert base("./absent") == str(tmp_path / "absent")
    assert base("m.gguf") == str(tmp_path / "m.gguf")


def test_a_recipe_cannot_be_changed_after_validation() -> None:
    recipe = recipe_from()
    with pytest.raises(ValueError, match="frozen"):
        setattr(recipe.train, "epochs", 9)  # noqa: B010


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml").base == "smollm2-135m"


def test_files_that_cannot_be_read_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "gbk.yaml").write_bytes("base: 模型\n".encode("gb18030"))
    for name, expected in (
        ("absent.yaml", "there is no recipe at"),
        ("gbk.yaml/r.yaml", "there is no recipe at"),
        (".", "is a folder"),
        ("gbk.yaml", "is not UTF-8 (byte 8)"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        with pytest.raises(MetierError, match=re.escape(expected)):
            load_recipe(tmp_path / name)
