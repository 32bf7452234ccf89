"""The letters of options, and the option that a text names.

Two rules. `option_letter` is the original's, by which the paper's reward and solutions are read: the first letter that
stands alone, wherever it stands. `stated_letter` reads an answer as a person would: what is stated last and plainly.
"""

import re
import unicodedata
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options, in their order; a question cannot have more

_PAPER_LETTERS = 5  # the original knows A-E
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

# ---- the original's rule -----------------------------------------------------------------------------------------


def option_letter(text: str, num_options: int = _PAPER_LETTERS) -> str | None:
    """The first letter A-E that stands alone, in upper case; None where there is none.

    The rule of the original: only one of a-z next to it disqualifies a letter, so "2a" gives A, and so does
    the article in "a cat". Of a question with more than five options, its further letters count too.
    """
    last = LETTERS[max(_PAPER_LETTERS, num_options) - 1].lower()
    match = re.search(rf"(?<![a-z])[a-{last}](?![a-z])", text.lower())
    return match[0].upper() if match else None


def solution_letter(solution: str, num_options: int = _PAPER_LETTERS) -> str | None:
    """The right option of a solution text, which may stand in <answer> tags."""
    tagged = _ANSWER_TAG.search(solution)
    return option_letter(tagged[1] if tagged else solution, num_options)


# ---- as a person reads -------------------------------------------------------------------------------------------

_REASONING = re.compile(r"^.*[<\[◁]/(?:think|thinking|reasoning)[>\]▷]", re.DOTALL | re.IGNORECASE)
_UNFINISHED = re.compile(r"[<\[◁](?:think|thinking|reasoning)[>\]▷].*", re.DOTALL | re.IGNORECASE)
_LONGEST = 1000  # characters behind an announcement: an answer may repeat one thousands of times
_MARKS = re.compile(r"[*_`#$]+|\\(?:boxed|text|mathrm|mathbf)\b")
_LINKS = r"(?: ?(?:is|are|be|would be|should be|must be|will be))"
# What announces the answer; behind it come a letter, an option's text, or several letters.
_STATED = re.compile(
    "|".join(
        (
            rf"\bans(?:wer)?(?: option| choice| letter)?{_LINKS}? ?:?",
            rf"\b(?:best|correct|right) (?:option|choice|letter){_LINKS}? ?:?",
            rf"\b(?:option|choice){_LINKS} ?:?|\b(?:option|choice|answer) ?: ?",
            r"\bI(?: would|'d|'ll| will)? (?:choose|pick|select|say|go with|go for)\b",
            r"\b(?:choose|pick|select|so|thus|hence|therefore)\b,?",
            r"答案(?:是|为|应该是|选)? ?:?|(?:应该?|故|所以)?选择?(?:项)?(?:是|为)? ?:?",
        )
    ),
    re.IGNORECASE,
)
# Words behind a capital A or I with which it is not the article or the pronoun.
_NOT_A_WORD = r"(?! +(?!(?:is|was|because|since|as|and|or|for|but|with|seems|would|given|due|,)\b)[A-Za-z]|['’])"
_NEGATION = (
    r"(?:\b(?:not|isn't|is not|neither|never|nor|rather than|instead of|(?:can't|cannot|can not) be) |(?:不是|不选) ?)"
)


def stated_letter(text: str, options: Sequence[str]) -> str | None:
    """The option that an answer states, None where it states none or several.

    Looked at in turn, behind reasoning in think tags: what is announced last ("The answer is (B)", "选B", \\boxed{B});
    a letter that stands alone in the last or first line or begins it ("b.", "B: because ..."); the text of exactly one
    option; the only letter in the text that is neither denied ("not A", "A is wrong") nor an article or pronoun.
    Lower case counts where the letter is all there is, in brackets, or announced.
    """
    if not options:
        return None
    letters = LETTERS[: len(options)]
    text = unicodedata.normalize("NFKC", text)
    text = _UNFINISHED.sub("", _REASONING.sub("", text))
    if tagged := _ANSWER_TAG.findall(text):
        text = tagged[-1]
    text = re.sub("</?answer>", "", text)  # one that the last token cut off
    is_boxed = list(re.finditer(r"\\boxed *\{(.*?)\}", text))
    if is_boxed:
        text = is_boxed[-1][1]
    text = re.sub(r"[ \t]+", " ", _MARKS.sub("", text)).strip()
    if (alone := _alone(text, letters)) or (alone := _of_text(text, options)):
        return alone
    announced = _without_denied(text, letters)
    for said in reversed(list(_STATED.finditer(announced))):
        rest = re.split(
            r"\n|(?<=[A-Za-z)])[.;](?: |$)", announced[said.end() : said.end() + _LONGEST].strip(" :\"'"), maxsplit=1
        )[0]
        if named := _of_text(rest, options):
            return named
        if found := _behind(rest, letters):
            return found.pop() if len(found) == 1 else None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines[:-2:-1] + lines[:1]:
        if named := _alone(line, letters) or _of_text(line, options):
            return named
    starts = [re.match(rf"\(?([{letters}{letters.lower()}])[).:](?![\w(])", line) for line in lines]
    begun = {start[1].upper() for start in starts if start}
    if len(begun) == 1 and starts[0]:
        return begun.pop()
    named = _called_right(announced, letters) or _standing(announced, letters)
    return named.pop() if len(named) == 1 else None


def _alone(text: str, letters: str) -> str | None:
    """The letter where a text is nothing else: "b", "(B).", "option b"."""
    found = re.fullmatch(rf"(?:option|choice|answer)?\W*([{letters}{letters.lower()}])\W*", text, re.IGNORECASE)
    return found[1].upper() if found and found[1].upper() in letters else None


def _of_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option whose text this is."""

    def plain(words: str) -> str:
        words = unicodedata.normalize("NFKC", words).strip(" .\"'!")
        return re.sub(r"^(?:it|this|that)(?: is|'s) ", "", words, flags=re.IGNORECASE).casefold()

    def without_article(words: str) -> str:
        return re.sub(r"^(?:an?|the) ", "", words)

    said = plain(text)
    own = [(letter, plain(option)) for letter, option in zip(LETTERS, options, strict=False)]
    for found in (
        [letter for letter, option in own if said and said in (option, f"{letter.lower()} {option}")],
        [letter for letter, option in own if without_article(said) == without_article(option) != ""],
    ):
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _without_denied(text: str, letters: str) -> str:
    """The text without the letters that it says are wrong."""
    letter = rf"(?:options? |choices? )?\(?[{letters}]\)?"
    joined = rf"{letter}(?:(?:/| ?&| and| or) ?{letter}(?!\w))*"
    text = re.sub(rf"{_NEGATION}{joined}(?![A-Za-z0-9_'])", " ", text, flags=re.IGNORECASE)
    wrong = (
        r"(?:is|are|was|seems?|looks?)(?: \w+)? (?:not|wrong|incorrect|false|excluded|ruled out)\b|isn't|can't|cannot"
    )
    said = rf",? (?:{wrong})|(?:选项)?(?:是|为)?(?:错|不对|不正确)"
    return re.sub(rf"(?<![A-Za-z0-9_'])(?:{letter}, ?)*{joined}(?:{said})", " ", text)


def _called_right(text: str, letters: str) -> set[str]:
    """The letter that a text without denied ones calls right last ("B is correct"), not one of several joined ones."""
    right = r",? (?:is|was|seems|looks)(?: \w+){0,2} (?:correct|right|true|best)\b|(?:选项)?(?:是|为)?(?:正确|对)"
    joined = r"(?<![A-Z], )(?<!\bor )(?<!\band )(?<![A-Z]/)(?<![和或])"
    found = re.findall(rf"(?<![A-Za-z0-9_']){joined}(?:[Oo]ption )?\(?([{letters}])\)?(?:{right})", text)
    return set(found[-1:])


def _behind(rest: str, letters: str) -> set[str]:
    """The letters that a statement names at its beginning, with those joined to it by "and" and "or"."""
    one = rf"(?:option |choice )?[(\[{{\"']?([{letters}{letters.lower()}])(?!\w|['’]\w){_article(rest)}[)\]}}\"']?"
    found, start = set(), 0
    while match := re.compile(one).match(rest, start):
        found.add(match[1].upper())
        joined = re.compile(r"(?: ?(?:,|/|&|and|or|或|和) ?)+").match(rest, match.end())
        if not joined:
            break
        start = joined.end()
    return found


def _article(rest: str) -> str:
    """A letter behind which a word follows is an article or a pronoun."""
    return _NOT_A_WORD if re.match(r"[(\[{\"']?[AaIi](?![\w])", rest) else ""


def _standing(text: str, letters: str) -> set[str]:
    """All letters that stand alone: capitals that are no article or pronoun, and any in brackets or behind "option"."""
    small = letters.lower()
    capital = rf"(?<![A-Za-z0-9'’])([{letters}])(?![A-Za-z0-9'’])"
    found = {m[1] for m in re.finditer(capital, text) if m[1] not in "AI" or re.match(_NOT_A_WORD, text[m.end() :])}
    found |= {m[1].upper() for m in re.finditer(rf"\(([{letters}{small}])\)", text)}
    return found | {m[1].upper() for m in re.finditer(rf"\b[Oo]ption ([{letters}{small}])(?![\w'])", text)}
