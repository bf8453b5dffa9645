"""The section "Which mixer when" of the report: sentences generated from the numbers, with intervals."""

from __future__ import annotations

import math

from visionattn.arena.results import Arena, Column

__all__ = ["Verdicts", "choose", "judge"]

QUESTIONS = {
    "recall": "To find a value by its key anywhere on the grid ({title})",
    "recall on a larger grid": "To do so on a larger grid than in training ({title})",
    "regression error": "To estimate a slope from examples ({title})",
    "accuracy": "To classify images ({title})",
}
_MOST = 8  # names in a sentence


class Verdicts(dict[str, list[str]]):
    """Mixers that are `better`, `worse`, `equal` (no difference is shown) or `some seeds` (better on some seeds)."""


def judge(arena: Arena, column: Column) -> Verdicts:
    """Compare all mixers with softmax attention, paired by seed.

    A mixer is better or worse if the 95 % interval of the mean difference excludes zero. Intervals are not corrected
    for the number of mixers.
    """
    sign = 1 if column.higher else -1
    found = Verdicts({"better": [], "equal": [], "some seeds": [], "worse": []})
    for mixer in arena.mixers:
        own, softmax = (arena.values(name, column.measure, column.setting) for name in (mixer, "softmax"))
        if mixer == "softmax" or not own or len(own) != len(softmax):
            continue
        low, high = sorted(sign * end for end in arena.difference(mixer, column)[1])
        ahead = [sign * (a - b) > 0 for a, b in zip(own, softmax)]
        if low > 0:
            kind = "better"
        elif high < 0:
            kind = "worse"
        else:
            kind = "some seeds" if any(ahead) and not all(ahead) else "equal"
        found[kind].append(mixer)
    return found


def choose(arena: Arena) -> list[str]:
    """Sentences for each question that was measured, and sentences that combine quality and speed."""
    columns = [column for column in arena.columns() if column.measure in QUESTIONS and column.setting != "L=80"]
    sentences = [_answer(arena, column) for column in columns]
    if arena.plan.seeds < 2 and sentences:
        sentences.insert(
            0, "One seed was trained, so that there are no intervals and no mixer is called better or worse."
        )
    return [*sentences, *_large_grids(arena, columns)]


def _answer(arena: Arena, column: Column) -> str:
    question = QUESTIONS[column.measure].format(title=column.title)
    softmax = arena.cell("softmax", column)
    verdicts = judge(arena, column)
    if arena.plan.seeds < 2:
        order = sorted(
            (mixer for mixer in arena.mixers if arena.values(mixer, column.measure, column.setting)),
            key=lambda mixer: arena.estimate(mixer, column.measure, column.setting).mean,
            reverse=bool(column.higher),
        )
        return f"{question}: softmax has {softmax}; the best are {', '.join(order[:_MOST])}, in this order."
    words = [f"{question}: softmax has {softmax}."]
    for kind, text in (("better", "Better"), ("worse", "Worse")):
        if verdicts[kind]:
            ranked = sorted(verdicts[kind], key=lambda mixer: -abs(arena.difference(mixer, column)[0]))
            more = f", and {len(ranked) - _MOST} more" if len(ranked) > _MOST else ""
            words.append(f"{text}: {', '.join(_with_interval(arena, m, column) for m in ranked[:_MOST])}{more}.")
    if not verdicts["better"]:
        words.append("No mixer is better.")
    if verdicts["equal"]:
        words.append(f"No difference is shown: {', '.join(verdicts['equal'])}.")
    if verdicts["some seeds"]:
        words.append(f"Better on some seeds only, which is inconclusive: {', '.join(verdicts['some seeds'])}.")
    return " ".join(words)


def _with_interval(arena: Arena, mixer: str, column: Column) -> str:
    mean, (low, high) = arena.difference(mixer, column)
    return f"{mixer} {mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _large_grids(arena: Arena, columns: list[Column]) -> list[str]:
    tokens = arena.tokens()
    if not tokens:
        return []
    sentences = []
    for n in dict.fromkeys(n for n in (3136, tokens[-1]) if n in tokens):
        faster = {}
        for mixer in arena.mixers:
            ratio = arena.estimate(mixer, "times faster", f"N={n}").mean
            if mixer != "softmax" and not math.isnan(ratio) and ratio > 1.1:
                faster[mixer] = ratio
        ranked = sorted(faster, key=lambda mixer: -faster[mixer])
        shown = ", ".join(f"{mixer} {faster[mixer]:.1f} times" for mixer in ranked) or "none"
        sentences.append(f"More than 10 % faster than softmax at N = {n:,}: {shown}.")
        for column in (c for c in columns if c.measure in ("recall", "accuracy") and arena.plan.seeds > 1):
            worse = judge(arena, column)["worse"]
            kept = [mixer for mixer in ranked if mixer not in worse]
            sentences.append(f"Of these, not worse in {column.title}: {', '.join(kept) or 'none'}.")
    return sentences
