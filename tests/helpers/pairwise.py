"""Few combinations of many options, in which every pair of values still occurs together."""

from itertools import combinations, product


def covering(axes, valid=lambda row: True, strength=2):
    """Rows (dicts) such that each ``strength`` values of different axes that a valid row can
    hold together stand together in one of them. Greedy, and the same at every call.

    axes: name -> values. valid: which complete rows make sense.
    """
    names = list(axes)
    rows = [dict(zip(names, values, strict=True)) for values in product(*axes.values())]
    rows = [row for row in rows if valid(row)]
    groups = list(combinations(names, strength))

    def tuples(row):
        return {(group, tuple(repr(row[name]) for name in group)) for group in groups}

    candidates = [(row, tuples(row)) for row in rows]
    missing = set().union(*(held for _, held in candidates)) if candidates else set()
    chosen = []
    while missing:
        # a row's gain only shrinks, so rows without any are dropped for good
        candidates = [(row, left) for row, held in candidates if (left := held & missing)]
        best, gain = max(candidates, key=lambda candidate: len(candidate[1]))
        chosen.append(best)
        missing -= gain
    return chosen
