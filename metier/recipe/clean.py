"""The recipe's `clean`: what is made of untidy text, and which records are left out for it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Count, Section


class CleanConfig(Section):
    """Each rule by itself; what each one did is counted in the manifest and the data card."""

    control: bool = Field(
        default=True,
        description="Take out control characters, zero-width spaces, soft hyphens and, where no right-to-left letter "
        "stands, direction marks.",
    )
    whitespace: bool = Field(
        default=True,
        description="Write every line end as LF and every odd space (no-break, thin) as a space. Indentation, blank "
        "lines and the ideographic space stay.",
    )
    width: bool = Field(
        default=True,
        description="Write full-width letters, digits, percent signs and full stops (\uff0e) as half-width ones, "
        "one for one. Chinese punctuation stays.",
    )
    html: bool = Field(
        default=False, description="Take out HTML tags and resolve character references such as `&amp;`. Off: counted."
    )
    script: Literal["keep", "simplified", "traditional"] = Field(
        default="keep", description="Convert Chinese to one script, by phrases; needs `pip install metier[chinese]`."
    )
    mojibake: Literal["keep", "reject"] = Field(
        default="keep", description="Records with text that was once read in the wrong encoding; always counted."
    )
    boilerplate: Literal["keep", "remove"] = Field(
        default="keep",
        description="First and last lines that at least 20 records and one in ten share, in texts of several lines; "
        "always counted.",
    )
    min_chars: Count | None = Field(default=None, description="Leave out records whose prompt or text is shorter.")
    max_chars: Count | None = Field(default=None, description="Leave out records that are longer in all.")
    languages: list[Literal["zh", "en", "other"]] = Field(
        default=[], description="Leave out records in another language. Empty: all stay."
    )
    contradictions: Literal["keep", "drop", "majority"] = Field(
        default="keep",
        description="Equal prompts with different labels: always listed; `drop` leaves all of them out, `majority` "
        "those with the rarer labels.",
    )
