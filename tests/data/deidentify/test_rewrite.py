"""Tries to make a second pass change something, one person get two surrogates, and a policy say what it does not do."""

from __future__ import annotations

from pathlib import Path

import pytest

import metier
from metier.data.deidentify.checksums import is_valid
from metier.data.deidentify.operators import Context, replace, stand_in
from metier.data.deidentify.policy import OPERATORS, TYPES, load_policy, policy_names
from metier.data.deidentify.residual import suspicions
from metier.data.deidentify.rewrite import rewrite
from metier.data.deidentify.spans import Span
from metier.errors import RecipeError

KEY = bytes(range(32))
TEXTS = [
    "患者王小明(住院号ZY20230001,身份证11010519491231002X)于2023年5月1日入院,电话13800138000,家住浙江省杭州市西湖区文三路18号。",
    "王小明的妻子李雪梅说,卡号6222021234567890128已挂失,车牌粤B12345。",
    "John Smith (MRN 12345678) was seen on March 3, 2021. Mr. Smith, 93 years old, lives in Springfield, IL 62704.",
    "Contact Jane Doe at jane@example.org or (415) 555-2671, SSN 536-22-1234, from 10.20.30.40.",
    "没有个人信息的句子。The P/E ratio is 15.",
]


@pytest.fixture(autouse=True)
def _key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_KEY_FILE", str(tmp_path / "key"))


@pytest.mark.parametrize("policy", policy_names())
def test_a_second_pass_changes_nothing(policy: str) -> None:
    once = [text for text, _ in metier.deidentify(TEXTS, policy=policy)]
    assert once != TEXTS and once[-1] == TEXTS[-1]
    assert [text for text, _ in metier.deidentify(once, policy=policy)] == once


def test_the_text_outside_the_spans_is_as_it_was() -> None:
    for before, (after, spans) in zip(TEXTS, metier.deidentify(TEXTS, policy="pipl"), strict=True):
        kept, last = "", 0
        for span in spans:
            kept, last = kept + before[last : span.start], span.end
        rest = kept + before[last:]
        for piece in (before[s.start : s.end] for s in spans if s.entity_type not in ("DATE", "AGE")):
            assert piece not in after
        assert len(rest) <= len(before) and all(char in after for char in rest)


def test_what_the_output_gives_away_is_taken_out_of_the_input_too() -> None:
    """The zip code's three digits would read as a part of the address before them in a second pass."""
    texts = ["PSC 1290 Box 1209\nAPO AA 72634", "H.No. 89, Rajagopal Nagar, Kadapa 607598", "In Romero v. White, he"]
    for policy in policy_names():
        once = metier.deidentify(texts, policy=policy)
        twice = metier.deidentify([text for text, _ in once], policy=policy)
        assert [text for text, _ in twice] == [text for text, _ in once]
        for text, spans in once:
            assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False)), text


def test_each_operator_does_what_it_says() -> None:
    policy, context = load_policy("pipl"), Context(KEY, "patient 7")
    made = {
        operator: stand_in("2023-05-01", "DATE", load_policy("pipl", {"DATE": operator}), context)
        for operator in OPERATORS
    }
    assert made["mask"] == "****-**-**" and made["label"] == made["surrogate"] == "[DATE]"
    assert made["generalise"] == "2023" and made["drop"] == ""
    assert len(made["date_shift"]) == 10 and made["date_shift"] != "2023-05-01"
    spans = [Span(3, 5, "DATE", 0.9), Span(0, 2, "PERSON", 0.9)]
    assert replace("ab cd!", spans, policy, context) == ("[PERSON] [DATE]!", [(0, 8), (9, 15)])


@pytest.mark.parametrize(
    ("first", "second"),
    [("2023-05-01", "2023-05-11"), ("2023年5月1日", "2023年5月11日"), ("May 1, 2023", "May 11, 2023")],
)
def test_dates_of_one_subject_shift_together(first: str, second: str) -> None:
    import datetime
    import re

    policy = load_policy("pipl", {"DATE": "date_shift"})
    days = []
    for value in (first, second):
        new = stand_in(value, "DATE", policy, Context(KEY, "patient 7"))
        written = new if new[0].isalpha() else "-".join(re.findall(r"\d+", new))
        days.append(datetime.datetime.strptime(written, "%b %d, %Y" if new[0].isalpha() else "%Y-%m-%d"))
    assert (days[1] - days[0]).days == 10
    other = stand_in(first, "DATE", policy, Context(KEY, "patient 8"))
    assert other != stand_in(first, "DATE", policy, Context(KEY, "patient 7"))


@pytest.mark.parametrize(
    ("value", "entity_type", "expected"),
    [
        ("93", "AGE", "90+"),
        ("62704", "ZIP_CODE", "627"),
        ("03601", "ZIP_CODE", "000"),
        ("62704-1234", "ZIP_CODE", "627"),
        ("二〇二三年五月一日", "DATE", "二〇二三年"),
        ("5月1日", "DATE", "[DATE]"),
        ("March 3, 2021", "DATE", "2021"),
    ],
)
def test_generalising_follows_safe_harbor(value: str, entity_type: str, expected: str) -> None:
    assert stand_in(value, entity_type, load_policy("hipaa-safe-harbor"), Context()) == expected


def test_one_person_has_one_surrogate_and_keys_differ() -> None:
    policy = load_policy("gdpr-pseudonymised")
    (one, _), (two, _) = rewrite(TEXTS[:2], policy, key=KEY)
    name = one[2 : one.index("(")]
    assert name != "王小明" and two.startswith(f"{name}的妻子")
    (other, _) = rewrite(TEXTS[:1], policy, key=bytes(32))[0]
    assert other[2 : other.index("(")] != name
    (english, _) = rewrite(TEXTS[2:3], policy, key=KEY)[0]
    last = english.split(" (")[0].split()[1]
    assert f"Mr. {last}, " in english


@pytest.mark.parametrize(
    ("value", "entity_type", "check"),
    [
        ("11010519491231002X", "CN_ID_CARD", "id_card"),
        ("6222021234567890128", "CREDIT_CARD", "card"),
        ("91350100M000100Y43", "CN_USCC", "uscc"),
        ("GB82 WEST 1234 5698 7654 32", "IBAN_CODE", "iban"),
    ],
)
def test_a_surrogate_keeps_the_form_and_fails_the_check(value: str, entity_type: str, check: str) -> None:
    made = stand_in(value, entity_type, load_policy("gdpr-pseudonymised"), Context(KEY))
    assert is_valid(check, value) and not is_valid(check, made)
    assert [c.isdigit() for c in made] == [c.isdigit() for c in value] and made != value


def test_ages_below_the_policys_are_no_identifiers() -> None:
    texts = ["He is 45 years old.", "He is 93 years old."]
    assert [len(spans) for _, spans in metier.deidentify(texts, policy="hipaa-safe-harbor")] == [0, 1]


def test_safe_harbor_states_each_of_the_eighteen_classes() -> None:
    policy = load_policy("hipaa-safe-harbor")
    assert [c["letter"] for c in policy.classes] == list("ABCDEFGHIJKLMNOPQR")
    assert all(c["status"] in ("done", "not applicable") and c["by"] for c in policy.classes)
    for entry in policy.classes:
        named = [word.strip(",") for word in entry["by"].split() if word.strip(",") in TYPES]
        assert entry["status"] == "not applicable" or named, entry["letter"]
        assert all(policy.operators[name] != "keep" for name in named)


def test_nothing_calls_its_output_anonymous() -> None:
    folder = Path(metier.__file__).parent / "data" / "deidentify"
    for path in folder.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8").lower()
        assert "anonymous" not in text and "anonymis" not in text and "匿名" not in text, path.name


@pytest.mark.parametrize("policy", ["hipaa", "pipl.yml", "gdpr"])
def test_an_unknown_policy_is_a_sentence(policy: str) -> None:
    with pytest.raises(RecipeError, match="policy"):
        metier.deidentify(["x"], policy=policy)


def test_a_policy_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("operators: {PERSON: mask}\n", encoding="utf-8")
    text, spans = metier.deidentify([TEXTS[0]], policy=str(tmp_path / "own.yaml"))[0]
    assert text.startswith("患者***(住院号ZY20230001") and {s.entity_type for s in spans} == {"PERSON"}
    (tmp_path / "own.yaml").write_text("operators: {PERSOON: mask}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="did you mean `PERSON`"):
        metier.deidentify(["x"], policy=str(tmp_path / "own.yaml"))


def test_one_text_instead_of_a_list_is_a_sentence() -> None:
    with pytest.raises(RecipeError, match="a list of texts"):
        metier.deidentify("one text")
    assert metier.deidentify(["王小明"], policy="none") == [("王小明", [])]


def test_a_role_before_a_stand_in_stays(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("operators: {PERSON: surrogate}\n")
    new = metier.deidentify(["Patient John Smith, aged 93. John Smith again."], policy=str(own))[0][0]
    assert new.startswith("Patient ") and "Smith" not in new and len(new.split()) == 8


def test_a_second_pass_leaves_the_first_digits_of_a_postal_code() -> None:
    once = metier.deidentify(["Postcode: 59801"])[0][0]
    assert once == "Postcode: 598" and metier.deidentify([once])[0][0] == once


def test_the_second_look_knows_whole_stand_ins_and_sees_real_numbers() -> None:
    key = bytes(range(32))
    numbers = [
        ("(020)33508037", "PHONE_NUMBER"),
        ("(377)551-9346x447", "PHONE_NUMBER"),
        ("GB06BHPG72129980633911", "IBAN_CODE"),
    ]
    policy = load_policy("gdpr-pseudonymised")
    for value, kind in numbers:
        made = stand_in(value, kind, policy, Context(key))
        assert made != value and suspicions(f"please call {made}.", key) == []
        assert [kind for _, _, kind in suspicions(f"please call {value}.", key)] == ["digits"]
    assert [kind for _, _, kind in suspicions("seen on 2023-05-27.", key)] == ["date"]


def test_a_class_that_the_recipe_keeps_is_not_called_done() -> None:
    kept = load_policy("hipaa-safe-harbor", {"AGE": "keep"}).answered({"DATE": 3, "PERSON": 2})
    by_letter = {entry["letter"]: entry for entry in kept}
    assert (by_letter["A"]["status"], by_letter["A"]["replaced"]) == ("done", 2)
    assert (by_letter["C"]["status"], by_letter["C"]["kept"], by_letter["C"]["replaced"]) == ("not done", ["AGE"], 3)
    assert by_letter["P"]["status"] == "not applicable" and "replaced" not in by_letter["P"]


def test_every_policy_says_its_classes_in_both_languages() -> None:
    for name in policy_names():
        policy = load_policy(name)
        for entry in policy.classes:
            texts = {language: entry.get(f"what_{language}", entry["what"]) for language in ("en", "zh")}
            assert texts["en"].isascii() and not texts["zh"].isascii(), (name, entry["letter"])
        assert {"en", "zh"} - set(policy.law_in), "the law itself is in one of them"


def test_the_pieces_of_a_joined_name_get_one_stand_in() -> None:
    text = "<name>Sarah MartinezAnne Lopez</name>"
    once = metier.deidentify([text], policy="gdpr-pseudonymised")[0][0]
    assert metier.deidentify([once], policy="gdpr-pseudonymised")[0][0] == once
