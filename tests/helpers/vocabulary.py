"""What the vocabularies of both CPU backends are held to: values to try, truth, errors in ULP."""

import numpy as np

F32, F64 = np.float32, np.float64

TRUTH = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "dsigmoid": lambda y: y * (1 - y),
    "dtanh": lambda y: (1 - y) * (1 + y),
    "relu": lambda x: np.maximum(x, 0),
    "drelu": lambda y: (y > 0).astype(y.dtype),
    "reciprocal": lambda x: 1 / x,
    "logsigmoid": lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))),
    "sqrt": np.sqrt,
    "dlogsigmoid": lambda y: -np.expm1(y),
    "dsqrt": lambda y: 1 / (2 * y),
}

INF, NAN = np.inf, np.nan
#: word -> arguments and values at the ends, those between NaN and infinity among them.
ENDS = {
    "exp": [(-INF, 0), (-1000, 0), (0, 1), (1000, INF), (INF, INF), (NAN, NAN)],
    "reciprocal": [(-INF, 0), (0, INF), (-0.0, -INF), (4, 0.25), (INF, 0), (NAN, NAN)],
    "logsigmoid": [(-INF, -INF), (-1000, -1000), (1000, 0), (INF, 0), (NAN, NAN)],
    "sqrt": [(0, 0), (-1, NAN), (4, 2), (INF, INF), (NAN, NAN)],
    "dlogsigmoid": [(-INF, 1), (-1000, 1), (-0.0, 0), (0, 0), (NAN, NAN)],
    "dsqrt": [(0, INF), (2, 0.25), (INF, 0), (NAN, NAN)],
}
#: The same of words of two values. At equal ones a gradient is shared, as torch shares it.
PAIRS = {
    "maximum": [
        *((1, 2, 2), (2, 1, 2), (-3, -3, -3), (-INF, -INF, -INF), (-INF, 5, 5), (INF, 5, INF)),
        *((NAN, 1, NAN), (1, NAN, NAN), (INF, NAN, NAN), (NAN, NAN, NAN)),
    ],
    "dmaximum": [
        *((1, 2, 0), (2, 1, 1), (-3, -3, 0.5), (0.0, -0.0, 0.5), (-INF, 5, 0), (INF, 5, 1)),
        *((NAN, 1, 1), (1, NAN, 1)),
    ],
}


def held_at_the_ends(apply, name: str, dtype: type) -> None:
    """apply(name, *arguments) -> values, of a word of ENDS or PAIRS."""
    *given, expected = np.array((ENDS | PAIRS)[name], dtype).T.copy()
    np.testing.assert_array_equal(apply(name, *given), expected, err_msg=name)


def samples(dtype: type, domain: tuple[float, float], curved: tuple[float, float]) -> np.ndarray:
    """float32: 2^21 random bit patterns of the domain and as many values spread evenly over its
    curved part; float64: a quarter as many; denormals, the least and the greatest values, and the
    ends of the domain."""
    rng = np.random.default_rng(0)
    n = 2**21 if dtype is F32 else 2**19
    word = np.uint32 if dtype is F32 else np.uint64
    random = rng.integers(0, np.iinfo(word).max, n, word).view(dtype)
    low, high = domain
    random = random[(random >= low) & (random <= high)]
    tiny, most = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max
    edges = np.array([0.0, -0.0, tiny, -tiny, 9 * tiny, most, -most, low, high], dtype)
    edges = edges[(edges >= low) & (edges <= high)]
    return np.concatenate([random, rng.uniform(*curved, n).astype(dtype), edges])


def ulp_error(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|got - truth| in units of the last place of the truth rounded to got's type."""
    rounded = truth.astype(got.dtype)
    exact = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    finite = np.where(np.isfinite(rounded), rounded, np.finfo(got.dtype).max)
    unit = np.spacing(np.abs(finite)).astype(truth.dtype)
    error = np.abs(got.astype(truth.dtype) - truth) / unit
    return np.where(exact, np.minimum(np.nan_to_num(error), 0.5), error)
