"""Tries to hide identifiers from the recognizers, and to make them see people in the language of a field."""

from __future__ import annotations

import random

import pytest

from metier.data.deidentify.detect import PART, detect, detect_together
from metier.data.deidentify.spans import Span, fold, resolve


def _found(text: str, *types: str) -> list[str]:
    return [text[s.start : s.end] for s in detect(text) if not types or s.entity_type in types]


STRUCTURED = [
    ("身份证11010519491231002X。", "CN_ID_CARD", "11010519491231002X"),
    ("号码110105 19491231 002x的", "CN_ID_CARD", "110105 19491231 002x"),
    ("旧证110105491231002已换", "CN_ID_CARD", "110105491231002"),
    ("电话13800138000元", "PHONE_NUMBER", "13800138000"),
    ("请拨138-0013-8000找我", "PHONE_NUMBER", "138-0013-8000"),
    ("手机１３８００１３８０００", "PHONE_NUMBER", "１３８００１３８０００"),
    ("座机(021)58881234", "PHONE_NUMBER", "(021)58881234"),
    ("卡号6222 0212 3456 7890 127", "CREDIT_CARD", "6222 0212 3456 7890 127"),
    ("信用代码91350100M000100Y43", "CN_USCC", "91350100M000100Y43"),
    ("车牌粤B·12345违停", "VEHICLE", "粤B·12345"),
    ("沪AD12345正在充电", "VEHICLE", "沪AD12345"),
    ("护照E12345678", "PASSPORT", "E12345678"),
    ("通行证H12345678", "CN_PERMIT", "H12345678"),
    ("住院号:ZY20230001", "MEDICAL_RECORD", "ZY20230001"),
    ("社保卡号A12345678", "SOCIAL_SECURITY", "A12345678"),
    ("学籍号G110105200501010011", "STUDENT_ID", "G110105200501010011"),
    ("微信abc_12345", "SOCIAL_ACCOUNT", "abc_12345"),
    ("QQ:12345678", "SOCIAL_ACCOUNT", "12345678"),
    ("SSN 536-22-1234", "US_SSN", "536-22-1234"),
    ("MRN: 00123456", "MEDICAL_RECORD", "00123456"),
    ("MBI 1EG4-TE5-MK73 on file", "HEALTH_PLAN", "1EG4-TE5-MK73"),
    ("NPI 1234567893", "LICENSE", "1234567893"),
    ("IBAN GB82 WEST 1234 5698 7654 32", "IBAN_CODE", "GB82 WEST 1234 5698 7654 32"),
    ("from 192.168.10.24 today", "IP_ADDRESS", "192.168.10.24"),
    ("host 2001:db8::8a2e:370:7334", "IP_ADDRESS", "2001:db8::8a2e:370:7334"),
    ("mail jane.doe@example.org", "EMAIL_ADDRESS", "jane.doe@example.org"),
    ("see https://example.org/p?id=7.", "URL", "https://example.org/p?id=7"),
    ("mac 00:1B:44:11:3A:B7", "DEVICE", "00:1B:44:11:3A:B7"),
    ("VIN 1HGCM82633A004352", "VEHICLE", "1HGCM82633A004352"),
    ("call (415) 555-2671 x12", "PHONE_NUMBER", "(415) 555-2671 x12"),
    ("born 03/04/1985", "DATE", "03/04/1985"),
    ("on March 3, 2021 he", "DATE", "March 3, 2021"),
    ("于2023年5月1日入院", "DATE", "2023年5月1日"),
    ("二〇二三年五月一日签订", "DATE", "二〇二三年五月一日"),
    ("lives in Springfield, IL 62704", "ZIP_CODE", "62704"),
]


@pytest.mark.parametrize(("text", "entity_type", "value"), STRUCTURED, ids=[f"{k}-{v}" for _, k, v in STRUCTURED])
def test_an_identifier_is_found_whole(text: str, entity_type: str, value: str) -> None:
    assert value in _found(text, entity_type)


NAMES = [
    ("患者王小明因胸闷入院。", "王小明"),
    ("由欧阳娜负责审批", "欧阳娜"),
    ("收件人:古丽娜尔·艾合买提", "古丽娜尔·艾合买提"),
    ("张女士反映情况", "张"),
    ("My name is john smith", "john smith"),
    ("Dear Mr. Baker, thank you", "Baker"),
    ("I spoke with Maria de la Cruz today", "Maria de la Cruz"),
    ("Hi 李雪梅, please call me", "李雪梅"),
    ("家住浙江省杭州市西湖区文三路18号3单元202室。", "浙江省杭州市西湖区文三路18号3单元202室"),
    ("他在同兴万点科技有限公司工作", "同兴万点科技有限公司"),
    ("Ship to 742 Evergreen Terrace, Springfield", "742 Evergreen Terrace, Springfield"),
]


@pytest.mark.parametrize(("text", "value"), NAMES, ids=[value for _, value in NAMES])
def test_a_name_or_address_is_found_whole(text: str, value: str) -> None:
    assert value in _found(text)


TERMS = [
    "白细胞计数偏高,安体舒通20mg口服,范畴不明。",
    "石斑鱼过敏,罗哌卡因麻醉,合同金额伍拾万元,单编号由系统生成。",
    "黄芪、白芍、当归各十克,水煎服。",
    "霍奇金淋巴瘤、克罗恩病与帕金森病的鉴别要点,夏普比率为1.5。",
    "市盈率P/E为15.3倍,EBITDA同比增长12%,沪深300上涨。",
    "HbA1c控制在7%以下,二甲双胍0.5g bid。",
    "本公司应当向商业银行、农民专业合作社和人民法院提交。",
    "Parkinson disease, Crohn's disease, Alzheimer's patients and Hodgkin lymphoma.",
    "ICD-10 code E11.9, NCT01234567 and ISIN US0378331005.",
    "The P/E ratio is 15, EBITDA grew 12 percent, and HbA1c was 7.2 %.",
    "The Sharpe ratio, the Apgar score, the Glasgow Coma Scale and a Foley catheter.",
    "Does it work with Visa, Mastercard or Apple Pay?",
    "Revenue was 1,234,567,890 dollars in 2021; section 1.2.3.4 applies.",
]


@pytest.mark.parametrize("text", TERMS)
def test_a_term_of_the_field_is_never_masked(text: str) -> None:
    assert [v for v in _found(text) if v not in _found(text, "TIME")] == []


def test_offsets_are_those_of_the_input_with_zero_width_characters() -> None:
    text = "电\u200b话138\u200b0013\u200d8000,\ufeff患者王小明"
    assert [text[s.start : s.end] for s in detect(text)] == ["138\u200b0013\u200d8000", "王小明"]


def test_folding_keeps_one_code_point_for_one() -> None:
    text = "ＡＢ１２３\u3000－“x”②㎏İ"
    folded, offsets = fold(text)
    assert offsets is None and len(folded) == len(text) and folded.startswith("AB123 -")


def test_a_sure_name_is_found_again_in_the_other_messages() -> None:
    first, second = detect_together(["Patient: Zbigniew Wolarski, seen today", "asked Wolarski to return"])
    assert [s.entity_type for s in first] == ["PERSON"] and [(s.start, s.end) for s in second] == [(6, 14)]


def test_overlapping_spans_keep_the_surer_and_the_rest_of_the_other() -> None:
    spans = [Span(0, 10, "ADDRESS", 0.7), Span(4, 6, "DATE", 0.9), Span(5, 12, "URL", 0.6)]
    assert resolve(spans) == [
        Span(0, 4, "ADDRESS", 0.7), Span(4, 6, "DATE", 0.9), Span(6, 10, "ADDRESS", 0.7), Span(10, 12, "URL", 0.6)
    ]  # fmt: skip


def test_any_text_gives_spans_in_order_inside_it() -> None:
    rng = random.Random(0)
    alphabet = "王小明在的,。13800[]@.:/-· \n\t\u200b①Ａ１ab CDJohnSmith年月日号é🙂"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 80)))
        end = 0
        for span in detect(text):
            assert end <= span.start < span.end <= len(text) and 0.5 <= span.score <= 1
            end = span.end


@pytest.mark.parametrize("unit", ["Aa", "Ab-", "Mr. ", "公司", "路1号"])
def test_a_long_text_of_one_unit_is_read_to_its_end(unit: str) -> None:
    # A pattern that starts over at each capital letter takes minutes for this.
    spans = detect(unit * (60_000 // len(unit)))
    assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("before", range(PART - 30, PART + 1, 6))
def test_an_identifier_where_a_long_text_is_cut_is_found_whole(before: int) -> None:
    text = (
        "word " * (before // 5)
        + "x " * (before % 5)
        + "Call Dr. John Smith at john.smith@example.org now. "
        + "word " * 100
    )
    found = [text[s.start : s.end] for s in detect(text)]
    assert "john.smith@example.org" in found and any("Smith" in part for part in found)


def test_a_word_beside_a_sure_name_is_a_name() -> None:
    assert "Frost" in _found("Both Frost and Maria Carter objected.", "PERSON")


def test_a_person_s_number_is_no_eponym() -> None:
    assert _found("can you send me Lopez's number?", "PERSON") == ["Lopez"]


def test_a_street_and_its_town_are_one_address() -> None:
    assert _found("Ship to 742 Evergreen Terrace, New Harbury", "ADDRESS") == ["742 Evergreen Terrace, New Harbury"]


def test_times_weekdays_and_years_are_told_apart_from_dates() -> None:
    assert _found("at 10:45 on Friday, since 1987; 星期三上午9点半", "TIME") == [
        "10:45",
        "Friday",
        "1987",
        "星期三",
        "上午9点半",
    ]


def test_a_possession_that_names_a_disease_too_leaves_the_person_found() -> None:
    assert _found("We asked whether Scott's fever is gone.") == ["Scott"]
    assert _found("Crohn's disease, Addison's disease and Newton's second law; Lynch syndrome.") == []
    assert "Lynch" in _found("I met Lynch, who never answers.")


def test_names_without_capitals_are_found_by_accents_cues_and_pairs() -> None:
    assert _found("what did gunārs want from us at the café?") == ["gunārs"]
    assert _found("tell unni that the résumé is late; she called.") == ["unni"]
    assert _found("from odetola llc: your order leaves today.") == ["odetola llc"]
    assert _found("please reset my password, thanks a lot, the app keeps crashing.") == []


def test_a_list_of_first_names_is_people_and_one_of_last_names_a_firm() -> None:
    text = "Homework club: Anna, Hugo and Melissa stayed. Invoice of Higgins, Cohen and Hartman."
    kinds = {text[s.start : s.end]: s.entity_type for s in detect(text)}
    assert kinds["Hugo"] == "PERSON" and kinds["Higgins, Cohen and Hartman"] == "ORGANIZATION"


def test_letters_of_all_latin_scripts_make_whole_names() -> None:
    for name in ("Əjdər Hüseynbəyli", "Trần Phương", "Žydrūnas Čepaitis"):
        assert _found(f"Patient: {name}, seen today.") == [name]


def test_names_of_forms_and_of_other_scripts_are_whole_and_dates_stay_dates() -> None:
    text = "Pt SANTANA, DEBORAH DOB 03/04/1976 SSN 523-45-6789, seen on 12 March 1970. Mr. Smith denies pain."
    assert _found(text, "PERSON") == ["SANTANA, DEBORAH", "Smith"]
    assert _found(text, "DATE") == ["03/04/1976", "12 March 1970"] and _found(text, "ADDRESS") == []
    assert _found("Please send it to Λήδρας 12 and tell Мария Иванова that it went.") == ["Λήδρας 12", "Мария Иванова"]
    assert _found("The α-helix, ΔG and β-blockers; 5 μg/L.") == []


def test_a_surname_before_a_title_is_found_behind_a_preposition() -> None:
    assert "庞" in _found("由庞主任接诊", "PERSON") and _found("请各主任参会。") == []


def test_a_word_that_may_be_a_name_is_one_where_no_word_has_a_capital_for_show() -> None:
    assert _found("The sample was mixed up with Snow.") == ["Snow"]
    assert _found("How can it be that my Card is blocked? Is the Church open?") == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("昨天给欧阳桂香转了500元", "欧阳桂香"),
        ("我刚给薛宁转了两千,备注写错了。", "薛宁"),
        ("放射科李畅读片", "李畅"),
        ("老刘昨天住院了", "刘"),
        ("2床刘建华昨夜睡眠差。", "刘建华"),
    ],
)
def test_a_chinese_name_between_a_plain_word_and_a_verb_is_found(text: str, name: str) -> None:
    assert _found(text, "PERSON") == [name]


@pytest.mark.parametrize(
    "text",
    ["请给余额不足的客户转人工服务。", "由公司和社会组织协商,应当公正。", "老龄化与小马过河。", "上官网查询余额。"],
)
def test_a_surname_s_character_in_everyday_words_is_no_name(text: str) -> None:
    assert _found(text, "PERSON") == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("April Wood called about her bill.", "April Wood"),
        ("I met May Chen yesterday.", "May Chen"),
        ("Contact: JohnSmith", "JohnSmith"),
        ("Reviewed by HeatherPace on Monday", "HeatherPace"),
        ("Attending: G. K. Rowe; resident: absent", "G. K. Rowe"),
        ("Wood et al. filed the suit.", "Wood"),
        ("Sarah: where are you", "Sarah"),
    ],
)
def test_a_name_that_is_written_oddly_is_found_whole(text: str, name: str) -> None:
    assert [found for found in _found(text, "PERSON") if found == name] == [name]


@pytest.mark.parametrize(
    "text",
    [
        "In April rain is common; May we close it? June is warm. The May statement differs.",
        "JavaScript, GitHub, PayPal, MedlinePlus, LaTeX and AstraZeneca.",
        "Fukuyama congenital muscular dystrophy, Duane-radial ray syndrome and Leber hereditary optic neuropathy.",
        "Take Xarelto, Eliquis or Humira; NSAIDs, E-cadherin and low-dose Plaquenil. Don't stop.",
        "Trisomy 21 may be inherited; vitamin C. Hypertelorism and Ventriculomegaly.",
        "银行业监督管理机构与小学生,管制与仲裁。",
    ],
)
def test_what_only_looks_like_a_name_is_left_alone(text: str) -> None:
    assert _found(text, "PERSON", "ORGANIZATION", "DATE", "LOCATION") == []


def test_an_eponym_stays_where_its_discoverer_is_named() -> None:
    text = "Named after James Paget. Most people with Paget disease feel nothing."
    assert _found(text, "PERSON") == ["James Paget"]


def test_what_a_form_s_label_calls_a_name_is_one() -> None:
    assert _found("Patient Name: april wood; DOB: unknown", "PERSON") == ["april wood"]
    assert _found("Drug name: metformin; Product Name: Gold Card; Customer Name: unknown") == []


def test_numbers_of_devices_and_staff_are_found_behind_their_abbreviations() -> None:
    assert _found("Pacemaker S/N: SN PM-88213-XK; Badge: EMP 44120") == ["PM-88213-XK", "44120"]
