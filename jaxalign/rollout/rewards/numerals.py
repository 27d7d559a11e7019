r"""Numbers in texts, as exact rationals: the grammar of `numeric_match`.

    number   = [sign] [currency [sign]] value [scale] [unit]
    value    = decimal | power | fraction | mixed
    decimal  = 7, 007, 1,234.5, 1 234.5, .5, 5., 1e3, 1.5E-3. Digits stand together, or by threes from the right with
               commas or single blanks between them; {,} and ,\! are commas, \, ~ and Unicode's blanks are blanks
    power    = decimal × 10^k, or 10^k; × may be *, x, \times or \cdot, and 10^k be 10^{k}, 10**k or 10³
    fraction = decimal/decimal, \frac{decimal}{decimal}, \frac34, ½; \dfrac, \tfrac and \cfrac are \frac
    mixed    = 2 1/2 (a numerator of one or two digits), 2\frac{1}{2}, 2½
    sign     = + - − (U+2212) and dashes, if no digit, letter or closing bracket stands before; a blank
               may follow - behind "is", =, : or an opening bracket; "negative", and "minus" behind "is", = or :
    currency = $ \$ US$ € £ ¥ ₹, and codes such as USD
    scale    = hundred, thousand, million, billion, trillion, lakh or crore, or two of them
    unit     = a word, \text{...}, % or °. It is not read: 50% equals 50\% and 50, not 0.5, as the graders of GSM8K and
               of MATH have it

Text with digits that is no number: another power (2^{10}), a multiple (2x, 2\pi, 2\sqrt{3}), a root (\sqrt{2}), ±5, a
fraction of anything else (\pi/2), digits with other marks between them (12,34, 1.2.3, 10:30, 1/2/3, 1'234, 1_000,
2024-01-05), a repeating decimal (0.\overline{3}, 0.(3)), another base (101_2, 0x1F), -(5), money in letters ($5M), a
denominator of 0, more than DIGITS digits, and a power of ten beyond EXPONENT. Exponents and indices (cm^2, x_1) and
digits in words (H2O) are passed over.

The number of a text is the first behind its last ####; else the one in its last \boxed{} (or \boxed 5); else its
last. A box must hold one number and no more than words beside it; "x =" before it is left out. The same is required of
an answer of the data.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

DIGITS = 1000  # of a number
EXPONENT = 1000  # of ten

# Repetitions are possessive or end at the next brace, so a text is read in time proportional to its length.
_DECIMAL = (
    r"(?:(?:[1-9]\d{0,2}(?:(?:,\d{3})++|(?: \d{3})++)(?!\d)|\d++)(?:\.\d++)?+|(?<![A-Za-z0-9.)])\.\d++)"
    r"(?:[eE][-+]?\d++(?![A-Za-z]))?+"
)
_FRACTION = rf"\\frac ?\{{ ?(?P<a>[-+]?{_DECIMAL}) ?\}} ?\{{ ?(?P<b>[-+]?{_DECIMAL}) ?\}}"
_TEN = r"10(?: ?\^ ?(?:\{ ?(?P<k>[-+]?\d++) ?\}|(?P<k_bare>[-+]?\d++))|\*\*(?P<k_stars>[-+]?\d++))"
_CODES = "USD|EUR|GBP|CAD|AUD|INR|Rs|RM"
_START = (
    r"(?:(?<![0-9A-Za-z)\]}%-])(?P<sign>[-+]))?+"
    rf"(?:(?:(?:US|CA|AU|NZ|HK)?[$€£¥₹]{{1,2}}+ ?|(?:{_CODES})(?=\.?\d))(?P<sign_behind>[-+])?+)?+"
)
_FORMS = [
    re.compile(_START + form)
    for form in (
        rf"(?P<whole>\d++) ?{_FRACTION}",
        r"(?P<whole>\d++) (?P<a>\d{1,2})/(?P<b>\d++)",
        _FRACTION,
        _TEN,
        rf"(?P<a>{_DECIMAL}) ?[*x] ?{_TEN}",
        rf"(?P<a>{_DECIMAL}) ?/ ?(?P<b>-?{_DECIMAL})",
        rf"(?P<a>{_DECIMAL})",
    )
]
_BROKEN = re.compile(rf"{_START}\\frac ?")
_LETTER = "A-Za-zÀ-ɏͰ-ϿЀ-ӿ"
_NEXT = re.compile(
    rf"(?P<number>{_START}(?:\\frac|(?:(?<![A-Za-z0-9.)])\.)?\d))"
    r"|(?P<spoiler>(?<![0-9A-Za-z)\]}%-])-\((?=[-+$]?[\d.\\])"
    r"|(?:\\sqrt|√) ?(?:\[[^\[\]{}]*+\])?+ ?|(?:\\pm|\\mp|[±∓]) ?|/(?= ?[\d\\]) ?)"
    rf"|\^ ?(?:\{{[^{{}}]*+\}}?|[-+]?[A-Za-z0-9]++)?|_ ?\{{[^{{}}]*+\}}?|\\[A-Za-z]++|[{_LETTER}][{_LETTER}0-9_]*+"
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {"lakh": 10**5, "crore": 10**7}
_SCALE = re.compile(rf" ?(?:\\text ?\{{ ?)?({'|'.join(_SCALES)})(?![A-Za-z-])", re.I)
_MORE = re.compile(  # digits that belong to the number, which is then none
    r"(?:[.,:'’_]| ?/ ?)\d[\d.,:/'’_]*+(?<=\d)|(?<=\d{4})-\d\d?+-\d\d?+(?!\d)|_ ?\{ ?\d++ ?\}|\.?\(\d++\)"
    r"|\.?\\(?:overline|bar|dot|overset|overparen)(?![A-Za-z]) ?(?:\{[^{}]*+\}|\d)"
)
_MONEY = re.compile(r" ?(?:[kKmMbB]n?|mil)(?![A-Za-z])")
_UNITS = (
    "mm|cm|dm|km|m|mi|ft|in|yd|mg|kg|g|lbs?|oz|ms|sec|s|mins?|hrs?|h|am|pm|AM|PM|m[lL]|[lL]|kWh?|W|[kMG]?Hz|[KMGT]B"
    f"|mph|kph|st|nd|rd|th|{_CODES}"
)
_FACTOR = re.compile(
    r" ?(?:\^(?! ?\{? ?(?:\\circ|°|\\text|\\mathrm|st|nd|rd|th))|\\(?:sqrt|pi|frac|infty)|[π√∞]|/ ?\\)"
    rf"|\*\*\d|(?!(?:{_UNITS})(?![A-Za-z])|[A-Za-z]{{4}})[A-Za-z]"
)
_BOX = re.compile(r"\\(?:boxed|fbox) ?(?=\{)")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_WORDS = re.compile(  # and punctuation, which may stand beside the only number
    r"(?:[\s.,;:$%°(){}\[\]€£¥₹\"'*]|\\[()\[\]]|\\(?:text\w*|math(?:rm|bf)|mbox|circ|q?quad)(?![A-Za-z])|(?<=°)[CF]"
    r"|\^ ?\{? ?(?:\\circ|°|-?[123](?!\d)|(?=\\|st|nd|rd|th))|/(?= ?[A-Za-z\\])|(?<=[A-Za-z])-(?=[A-Za-z])"
    r"|[A-Za-z]{2,}+|[mgshLlWNJV](?![A-Za-z])|(?![Ͱ-Ͽ])[^\W\d_A-Za-z])*+"
)
_BLANKS = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_CHARACTERS = {
    ord(c): plain
    for characters, plain in (
        ("−‐‑‒–—﹣", "-"),
        (_BLANKS, " "),
        ("\u200b\u2060\ufeff", ""),
        ("⁄∕", "/"),
        ("×⋅·∙∗", "*"),
    )
    for c in characters
} | {ord(c): chr(ord(c) - 0xFEE0) for c in "＋－．／＝＄％"}
_UNICODE = (
    ("[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}"),
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),
    ("[¼-¾⅐-⅞]", lambda match: unicodedata.normalize("NFKC", match[0])),
    (r"[^\x00-\x7f]", lambda match: str(unicodedata.decimal(match[0], match[0]))),
)
_LATEX = (
    (r"\\!|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"\{,\}", ","),
    (r"\\[,:; ]|~", " "),
    (r"\\([%$])", r"\1"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac ?(\d)", r"\\frac{\1}"),
    (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\boxed ?(-?\d++(?:,\d{3})*+(?:\.\d++)?+)", r"\\boxed{\1}"),
    (r"(?i)(?<![a-z])negative (?=[$\d.\\])", "-"),
    (r"(?i)((?<![a-z])is |[=:] ?)minus (?=[$\d.\\])", r"\1-"),
    (r"((?<![A-Za-z])is |[=≈:] ?|[(\[{$])- (?=[$\d.\\])", r"\1-"),
)


def number(text: str, *, alone: bool = False) -> Fraction | None:
    """The number of a text, by the grammar above; None where there is none.

    Args:
      alone: a text without #### and \\boxed must hold one number and no more than words beside it.
    """
    _, marked, text = _plain(text).rpartition("####")
    if boxes := list(_BOX.finditer(text)):
        content = text[boxes[-1].end() : _group_end(text, boxes[-1].end())]
        return _only(content) if content.endswith("}") else None  # else the response was cut off
    if alone and not marked:
        return _only(text)
    values = [value for value, _, _ in _numbers(text)]
    return None if not values else values[0] if marked else values[-1]


def _plain(text: str) -> str:
    """The text with one spelling for each sign."""
    for pattern, replacement in () if text.isascii() else _UNICODE:
        text = re.sub(pattern, replacement, text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    return text


def _only(text: str) -> Fraction | None:
    """The number of a text that holds one beside words, or of its part behind the last =."""
    text = re.split(r"=|≈|\\approx(?![A-Za-z])", text)[-1]
    text = re.sub(r"^([\s${(]*)- +", r"\1-", text)
    numbers = list(_numbers(text))
    if len(numbers) != 1:
        return None
    value, start, end = numbers[0]
    return value if _WORDS.fullmatch(f"{text[:start]} {text[end:]}") else None


def _numbers(text: str) -> Iterator[tuple[Fraction | None, int, int]]:
    """(value, start, end) of all numbers, from left to right; None for what has digits and is no number."""
    at = 0
    while match := _NEXT.search(text, at):
        at = match.end()
        if match["number"]:
            value, at = _value(text, match.start())
            yield value, match.start(), at
        elif match["spoiler"]:
            at = _group_end(text, at) if text[at : at + 1] == "{" else _value(text, at)[1]
            yield None, match.start(), at


def _value(text: str, start: int) -> tuple[Fraction | None, int]:
    """(value, end) of the number at a place; (None, end) where it is none, or not a number alone."""
    for form in _FORMS:
        if match := form.match(text, start):
            value, groups = _rational(match), match.groupdict()
            if "whole" in groups and "\\" not in match[0] and int(groups["a"]) >= int(groups["b"][:DIGITS]):
                continue  # 3 10/3 are two numbers
            break
    else:
        broken = _BROKEN.match(text, start)
        return None, _group_end(text, _group_end(text, broken.end())) if broken else start
    end = match.end()
    if more := _MORE.match(text, end):
        return None, more.end()
    if _FACTOR.match(text, end) or (re.search("[$€£¥₹]", match[0]) and _MONEY.match(text, end)):
        return None, end
    for _ in range(2):
        if scale := _SCALE.match(text, end):
            value, end = value if value is None else value * _SCALES[scale[1].lower()], scale.end()
    return value, end


def _rational(match: re.Match) -> Fraction | None:
    """whole + a / b · 10^k, with its sign."""
    groups = {name: value for name, value in match.groupdict().items() if value is not None}
    a, b, whole = (_decimal(groups.get(name, default)) for name, default in (("a", "1"), ("b", "1"), ("whole", "0")))
    ten = _decimal("1e" + next((value for name, value in groups.items() if name[0] == "k"), "0"))
    if a is None or not b or whole is None or ten is None or ("whole" in groups and not 0 < a < b):
        return None
    sign = (-1) ** [groups.get("sign"), groups.get("sign_behind")].count("-")
    return sign * (whole + a / b * ten)


def _decimal(text: str) -> Fraction | None:
    """The value of a decimal; None beyond DIGITS or EXPONENT."""
    digits, _, exponent = re.sub("[, ]", "", text).lower().partition("e")
    if len(digits) > DIGITS or len(exponent) > DIGITS or abs(int(exponent or 0)) > EXPONENT:
        return None
    return Fraction(digits) * Fraction(10) ** int(exponent or 0)


def _group_end(text: str, start: int) -> int:
    """The place behind the group in braces that begins at a place; the same place if none does."""
    depth = 0
    for match in _BRACES.finditer(text, start) if text.startswith("{", start) else ():
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text) if depth else start
