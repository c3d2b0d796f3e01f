"""How well a predicted answer matches the published ones, as the evaluation script of SQuAD does.

ReCoRD's script compares answers in the same way.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single blanks between words."""
    words = _ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(words.split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1.0 when the prediction equals one of the answers after normalisation, else 0.0.

    Args:
        answers: at least one; [""] where the question has no answer.
    """
    normal = normalize_answer(predicted)
    return max(float(normal == normalize_answer(answer)) for answer in answers)


def token_f1(predicted: str, answers: Sequence[str]) -> float:
    """F1 of the words that prediction and answer share, the best over the answers, in 0..1.

    Where nothing is left of one of them by normalisation it is 1.0 if nothing is left of both, as
    in the script of SQuAD 2.0 (that of 1.1 says 0.0).

    Args:
        answers: at least one; [""] where the question has no answer.
    """
    return max(_token_f1(predicted, answer) for answer in answers)


def _token_f1(predicted: str, answer: str) -> float:
    ours, theirs = normalize_answer(predicted).split(), normalize_answer(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    # 2PR / (P + R) with P = shared / ours and R = shared / theirs.
    return 2 * shared / (len(ours) + len(theirs))
