"""benchmarks/quantised_figures.py: figures of rows made by hand."""

import json

import pytest
from quantised_figures import figures, summary, tables

from tokprune.runtime.metrics import NORMAL_975


def rows(**bundles):
    """Eight questions, five labelled; each bundle is given by its answers, KLs and overlaps."""
    made = []
    for number, (right, base) in enumerate(zip([*"aaaaa", None, None, None], "aaabbxyz", strict=True)):
        given = {
            name: dict(zip(("answer", "kl", "kept_overlap"), (column[number] for column in columns), strict=True))
            for name, columns in bundles.items()
        }
        made.append({"question": number, "right": right, "base": base, "bundles": given})
    return made


NONE = [None] * 8
RISING = [0.1 * number for number in range(8)]


def test_answers_kl_and_kept_sets() -> None:
    # kept right, in other spelling; lost; kept right; won; wrong otherwise; changed, nobody knows how; two the same
    found = figures(
        rows(b=(["A.", "c", "a", "a", "c", "o", "y", "z"], RISING, [1.0, 0.5, None, None, 0.75, 1, 1, 1])), "b"
    )
    z2 = NORMAL_975**2
    centre, half = (0.5 + z2 / 16) / (1 + z2 / 8), NORMAL_975 * (0.25 / 8 + z2 / 256) ** 0.5 / (1 + z2 / 8)
    assert found.pop("agreement_wilson95") == pytest.approx([centre - half, centre + half], abs=1e-15)
    assert [found.pop(key) for key in ("kl_mean", "kl_median", "kl_p99")] == pytest.approx([0.35, 0.35, 0.693])
    assert found.pop("kept_overlap_mean") == pytest.approx(5.25 / 6, abs=1e-15)
    assert found == {
        "questions": 8,
        "agreement": 0.5,
        "labelled": 5,
        "correct_to_wrong": 1,
        "wrong_to_correct": 1,
        "wrong_to_other": 1,
        "mcnemar_p": 1.0,
        "accuracy_base": 0.6,
        "accuracy": 0.6,
        "kept_overlap_min": 0.5,
        "flips": [
            {"question": 1, "kind": "correct_to_wrong", "base": "a", "answer": "c", "right": "a"},
            {"question": 3, "kind": "wrong_to_correct", "base": "b", "answer": "a", "right": "a"},
            {"question": 4, "kind": "wrong_to_other", "base": "b", "answer": "c", "right": "a"},
            {"question": 5, "kind": None, "base": "x", "answer": "o", "right": None},
        ],
    }


def test_pairs_are_in_the_order_given() -> None:
    same, one = list("aaabbxyz"), list("caabbxyz")
    found = summary(rows(z=(same, RISING, NONE), y=(one, [kl + 0.5 for kl in RISING], NONE), x=(one, RISING, NONE)))
    assert list(found["figures"]) == ["z", "y", "x"]
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [("z", "y"), ("z", "x"), ("y", "x")]
    first, second, third = found["pairs"]
    assert first["agreement_points"] == 12.5
    assert first["agreement_points_ci95"] == [0.0, 37.5]  # quantiles of Binomial(8, ⅛)/8
    # every pair differs by as much, so that there is nothing to draw
    assert [first["kl"], *first["kl_ci95"]] == pytest.approx([-0.5] * 3, abs=1e-15)
    assert (second["kl"], second["kl_ci95"]) == (0.0, [0.0, 0.0])
    assert (third["agreement_points"], third["agreement_points_ci95"]) == (0.0, [0.0, 0.0])
    assert found["figures"]["z"]["flips"] == []
    assert found["figures"]["z"]["kept_overlap_mean"] is None


def test_a_divergence_that_is_not_finite_is_not_averaged_away() -> None:
    same = list("aaabbxyz")
    found = summary(rows(b=(same, [float("inf"), *RISING[1:]], NONE), c=(same, [float("nan"), *RISING[1:]], NONE)))
    assert [found["figures"][name]["kl_mean"] for name in "bc"] == [None, None]
    assert (found["pairs"][0]["kl"], found["pairs"][0]["kl_ci95"]) == (None, None)
    json.dumps(found, allow_nan=False)


def test_999_of_1000_are_not_all() -> None:
    answers = [{"answer": "a", "kl": 0.0, "kept_overlap": None}] * 2000
    many = [
        {"question": number, "right": "a", "base": "b" if number == 7 else "a", "bundles": {"one": answer}}
        for number, answer in enumerate(answers)
    ]
    text = tables({"base": {"name": "base"}, "remarks": {"one": ["it rounds"]}, **summary(many)})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "answers equal 99.9 % [99.7, 100.0]" in lines
    assert "accuracy, base 99.9 %" in lines
    assert "accuracy, bundle 100.0 %" in lines
    assert "one 7 wrong to correct 'b' 'a' 'a'" in lines
    assert lines[-1] == "one: it rounds"
