"""Answer matching against values counted by hand from the rules of SQuAD's script."""

import pytest

from ptv2_fast.tasks.answer_metrics import exact_match, normalize_answer, token_f1

NORMAL = {
    "The  Norse leader\t(Rollo).": "norse leader rollo",
    "a cat, an owl and the then-new theatre": "cat owl and thennew theatre",
    "U.S.A": "usa",
    # The hyphen goes before articles are looked for, the long dash is not ASCII and stays.
    "an-the": "anthe",
    "the—end": "—end",
    "The": "",
    "": "",
}


@pytest.mark.parametrize("text", NORMAL)
def test_normalisation(text):
    assert normalize_answer(text) == NORMAL[text]


def test_exact_match_takes_any_of_the_answers():
    assert exact_match("the Rollo!", ["Roll", "rollo"]) == 1.0
    assert exact_match("Rollo I", ["Roll", "rollo"]) == 0.0
    assert exact_match("", [""]) == 1.0


def test_f1_is_that_of_the_best_answer():
    # 2 of 3 predicted words are among the 4 of the answer: P 2/3, R 1/2.
    assert token_f1("the big red dog", ["red dog barks loud"]) == pytest.approx(4 / 7)
    assert token_f1("the big red dog", ["cat", "red dog barks loud", "dog"]) == pytest.approx(4 / 7)
    # A word counts as often as it stands in both.
    assert token_f1("no no no", ["no no yes"]) == pytest.approx(2 / 3)
    assert token_f1("cat", ["dog"]) == 0.0


def test_f1_without_words_is_equality():
    assert token_f1("", [""]) == 1.0
    assert token_f1("the", [""]) == 1.0
    assert token_f1("cat", [""]) == 0.0
    assert token_f1("", ["cat"]) == 0.0
