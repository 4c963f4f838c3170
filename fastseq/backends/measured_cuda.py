"""triton beside cuDNN on a GPU. ``python -m bench.rule --gpu`` writes this file; edit nothing here.

It was written from no results: none are under bench/results. :mod:`.cuda_rule` reads it.
"""

#: kind -> size -> a cuda_rule.Entry
Kinds = dict[str, dict[str, tuple[float, float | None, int, bool]]]

#: compute capability -> device -> (results, versions, commits and dates)
SOURCES: dict[str, dict[str, tuple[str, str, str]]] = {}

#: compute capability -> device -> (cell, type, way)
MEASURED: dict[str, dict[str, dict[tuple[str, str, str], Kinds]]] = {}

#: compute capability -> (cell, type) -> the widths at which every form passed its tests
GREEN: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {}
