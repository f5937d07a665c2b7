"""Street addresses in Latin script -> spans: house number and street by their usual words in a dozen languages.

An address that is found takes what follows it along: unit, town, state, postal code and country, over commas and line
ends. After a cue (`I live at`) the rest of the line is read more freely. Limits: a street name without number, suffix or cue is missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from metier.data.deidentify.lexicon import words
from metier.data.deidentify.spans import Span

_L = "A-Za-z\u00c0-\u024f"
_CAP = rf"[A-Z\u00c0-\u00de][{_L}'.-]*"
_NUMBER = r"(?:No\.? ?|#)?\d{1,6}(?:[A-Za-z]\b|[-/]\d{1,4}[A-Za-z]?)?"
_SUFFIX = (
    "Street|Str|St|Avenue|Ave|Av|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Circle|Cir|Place|Pl|Square|Sq|Terrace|Ter|Trail|Trl|Parkway|Pkwy|Highway|Hwy|Way|Plaza|Plz|Crescent|Cres|Close|Gardens|"
    "Grove|Hill|Mews|Row|Walk|Alley|Aly|Loop|Ridge|Run|Pass|Path|Pike|Crossing|Xing|Point|Pt|View|Vista|Valley|Heights|Hts|Island|Isle|Key|Knoll|Landing|Manor|Meadow|Meadows|Mill|Mountain|Orchard|Park|"
    "Port|Prairie|Ramp|Rapids|Rest|River|Shore|Shores|Spring|Springs|Spur|Station|Stream|Summit|Track|Trace|Turnpike|Union|Village|Villages|Ville|Walks|Wall|Well|Wells|Bridge|Brook|Burg|Bypass|Camp|Canyon|Cape|"
    "Causeway|Center|Centers|Cliff|Cliffs|Club|Common|Corner|Corners|Course|Courts|Cove|Coves|Creek|Crest|Crossroad|Curve|Dale|Dam|Divide|Estate|Estates|Expressway|Extension|Fall|Falls|Ferry|Field|Fields|Flat|Flats|"
    "Ford|Forest|Forge|Fork|Forks|Fort|Freeway|Garden|Gateway|Glen|Glens|Green|Greens|Harbor|Harbors|Haven|Hills|Hollow|Inlet|Junction|Lake|Lakes|Light|Lodge|Mall|Mission|Motorway|Neck|Oval|Overpass|Passage|Pine|Pines|Plain|Plains|Radial|Ranch|"
    "Road|Route|Shoal|Skyway|Throughway|Tunnel|Underpass|Viaduct"
)
_BEFORE_NAME = "Via|Viale|Piazza|Corso|Rue|rue|Avenue|avenue|boulevard|place|chemin|Calle|C/|Avda\\.?|Avenida|Paseo|Plaza|Rua|R\\.|Rodovia|Residencial|Ladeira|Largo|Alameda|Pasadizo|Callejón|Ronda|Glorieta|Rambla|Cuesta|Acceso|Cañada|Urbanización|Via|Vicolo|Borgo|Contrada|Stretto|Rotonda|Travessa|Ul\\.|ul\\.|ulica|Strada|Cours|Quai|Route de|allée|Camino|Carrer|Praceta"
_GLUED = "straße|strasse|str|gasse|weg|platz|allee|ring|damm|straat|laan|plein|kade|gracht|dreef|gatan|vägen|gränd|stigen|gade|vej|vænget|gata|veien|vegen|veg|katu|tie|kuja|polku|utca|út|tér|ulice|ulica|cesta|gården|vangen|toften|parken|backen|steenweg|singel|hof"
_UNIT = r"(?:[, ]+\n?(?:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|Bldg|Building|Dept|Box|#)\.? ?#?[A-Za-z]?\d*[A-Za-z]?\b)"
_DIRECTION = r"(?:[NSEW]{1,2}\.?|North|South|East|West)"
_STREETS = re.compile(
    rf"(?<![0-9{_L}])(?:{_NUMBER},? (?:{_DIRECTION} )?(?:(?:{_CAP}|\d+(?:st|nd|rd|th)) ){{1,4}}(?:{_SUFFIX})s?\b\.?(?: {_DIRECTION}\b)?"
    rf"|{_NUMBER},? (?:{_BEFORE_NAME}) (?:[{_L}'.-]+ ?){{1,5}}(?<! )"
    rf"|(?:{_BEFORE_NAME}) (?:[{_L}'.-]+ ){{1,5}}?(?:,? ?n?\.? ?)?\d{{1,5}}(?:[/-][A-Za-z0-9]{{1,3}}|[A-Za-z])?\b"
    rf"|(?:{_CAP} ){{0,3}}(?:{_CAP}[ -]?)?[{_L}]{{2,}}(?:{_GLUED})\b\.? \d{{1,5}}(?: ?[a-zA-Z]\b|[/-]\d+)?"
    rf"|(?:USS|USNS|USNV|USCGC|USNV|CMR) {_CAP}"
    rf"|(?i:P\.? ?O\.? ?Box|Postfach|Apartado|PSC|Unit) ?#?\d{{1,6}}(?:,? Box \d+)?"
    rf"|(?:{_CAP} ){{1,3}}(?:Street|Avenue|Road|Boulevard|Lane|Drive|Terrace|Crescent|Parkway)\b(?!\.\w)"
    rf"|(?:{_CAP} )?[{_L}]{{3,}}(?:{_GLUED.replace('|str|', '|')})\b(?= |,|\.|$)(?!-)"
    rf"|(?:Suite|Apt\.?|Apartment) \d{{1,5}}[A-Z]?\b){_UNIT}?"
)
_TAIL = re.compile(
    rf"{_UNIT}|(?:,[ \n]*|[ \n]*\n[ \n]*)(?:(?:[A-Z]{{1,3}}[- ])?\d{{3,6}}(?:[- ]?\d{{2,4}}|[ ]?[A-Z]{{2}}\b)?(?: {_CAP}(?: {_CAP}){{0,3}})?|{_CAP}(?:[ -](?:{_CAP}|de|la|le|sur|am|an der|upon|en|do|da|dos)){{0,4}})"
    r"(?:,? ?[A-Z]{2,3}\b)?(?:,? \d{3,6}(?:[- ]?\d{2,4}| ?[A-Z]{2})?\b)?(?:,? [A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}\b)?(?: / [A-Z]{2}\b| \([A-Z]{2}\))?"
    r"|,? [A-Z]{2},? \d{5}(?:-\d{4})?\b|,? [A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}\b| \d{4,6}(?:-\d{3,4})?\b"
)
_CUE = re.compile(
    r"\b(?i:(?:home |mailing |billing |shipping |new |my |our |the )?address(?: is| was| to|:| at)?:?|liv(?:e|es|ed|ing) (?:at|on)|resid(?:es|ed|ing|ence) (?:at|on)|located (?:at|on)|ship(?:ped)? (?:it )?to|deliver(?:ed|y)? to|send (?:it |this |that )?to|mov(?:ed|ing) to|at the corner of)[ \n:]{1,2}"
    rf"(?P<v>(?=[^\n]{{0,70}}\d)(?:\d|{_CAP}|(?:{_BEFORE_NAME})\b)[^\n?!;\"]{{5,90}}(?:\n[ ]?[^\n?!;\"]{{3,60}}){{0,2}})"
)
# Where an address ends after a cue: at a word that goes on with the sentence.
_CUE_END = re.compile(r"(?:,| and| but| for| on| in| with| by| at| so|\.)? (?:and|but|my|the|please|is|was|since|because|for|by|with|which|that|I|he|she|they|we|can|phone|tel|call|email|starting|before|after|until)\b|\. |\.$|\.\n")


@cache
def _town_zip() -> re.Pattern[str]:
    """Springfield, IL 62704: a town with its state and postal code."""
    states = "|".join(words("en_states"))
    return re.compile(rf"(?<![{_L}])(?:{_CAP} ){{0,3}}{_CAP},? (?:{states})(?:,? (?P<z>\d{{5}}(?:-\d{{4}})?))?(?![0-9{_L}-])")


def find_addresses(text: str) -> Iterator[Span]:
    """Spans of folded `text`."""
    for match in _STREETS.finditer(text):
        end, has_number = match.end(), any(char.isdigit() for char in match.group()) or match.group().startswith("US")
        for _ in range(6):
            tail = _TAIL.match(text, end)
            if tail is None or not has_number:
                break
            end = tail.end()
        yield Span(match.start(), end, "ADDRESS", 0.88 if has_number else 0.6)
    for match in _CUE.finditer(text):
        value = match["v"]
        stop = _CUE_END.search(value)
        length = len((value[: stop.start()] if stop else value).rstrip(" ,.\n"))
        if length >= 5 and re.search(r"\d", value[:length]):
            yield Span(match.start("v"), match.start("v") + length, "ADDRESS", 0.7)
    for match in _town_zip().finditer(text):
        if match["z"]:
            yield Span(match.start(), match.start("z") - 1, "LOCATION", 0.8)
            yield Span(match.start("z"), match.end("z"), "ZIP_CODE", 0.85)
        else:
            yield Span(match.start(), match.end(), "LOCATION", 0.6)
