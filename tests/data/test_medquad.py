"""Tries to lose a question of MedQuAD's XML, or to take one without an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
XML = """<?xml version="1.0" encoding="UTF-8"?>
<Document id="7" source="CancerGov" url="https://example.org/7">
<Focus>Some Disease</Focus>
<QAPairs>
\t<QAPair pid="1"><Question qid="7-1" qtype="symptoms">What are the signs ?</Question>
\t<Answer>Fever &amp; a\n      cough</Answer></QAPair>
\t<QAPair pid="2"><Question qid="7-2" qtype="outlook">And then?</Question><Answer></Answer></QAPair>
\t<QAPair pid="3"><Question qid="7-3" qtype="outlook">At length?</Question><Answer>{long}</Answer></QAPair>
</QAPairs>
</Document>
"""


def test_questions_with_an_answer_of_400_words_at_most_are_taken(tmp_path: Path) -> None:
    (tmp_path / "MedQuAD" / "1_Cancer").mkdir(parents=True)
    (tmp_path / "MedQuAD" / "1_Cancer" / "7.xml").write_text(XML.format(long="word " * 401), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "medquad_jsonl.py"), str(tmp_path / "MedQuAD")]
    out = tmp_path / "data" / "medquad.jsonl"
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [
        {
            "source": "CancerGov", "document": "7", "url": "https://example.org/7", "focus": "Some Disease",
            "qtype": "symptoms", "question": "What are the signs ?", "answer": "Fever & a\n      cough",
        }
    ]  # fmt: skip
