"""VQA accuracy: a free answer against those of ten people (Antol et al. 2015, Goyal et al. 2017).

    accuracy("2 dogs.", ["two dogs", "2", ...])   # 1.0 if three people or more said "2 dogs"

Text is normalised exactly as in the official evaluation, so that numbers agree with published ones:
a number word becomes a digit only as a separate word, "none" is "0", and people's answers are
normalised only if they differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mllm_jax.evaluation.metrics import text

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(digit) for digit, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# Spellings without one apostrophe are corrected, "couldnt've" but not "couldntve". The official
# entries of "I'm" have a capital and never match, since text is lower-cased first.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
_MENDED = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTIONS.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the one reversed entry of the official table
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # number of periods removed: the official code passes a flag as the count


def normalise(text: str) -> str:
    """Normalise an answer: lower case, digits and apostrophes, no punctuation or articles."""
    out = text
    for mark in _PUNCTUATION:
        glued = mark + " " not in text and " " + mark not in text and not _DIGIT_COMMA.search(text)
        out = out.replace(mark, " " if glued else "")
    out = _PERIOD.sub("", out, count=_PERIODS)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Compute min(matches / 3, 1), averaged over leaving out each person once.

    Args:
      prediction: The model's answer.
      answers: People's answers, ten of them in VQAv2.

    Returns:
      The accuracy, 0 to 1.
    """
    text.strings([prediction], "prediction")
    text.strings(answers, "answers")
    if not len(answers):
        raise ValueError("VQA accuracy needs people's answers, got none")
    prediction, *answers = (re.sub(r"[\n\t]", " ", t).strip() for t in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalise, (prediction, *answers))
    same = sum(answer == prediction for answer in answers)
    left_out = [same - (answer == prediction) for answer in answers]
    return sum(min(1.0, count / 3) for count in left_out) / len(answers)
