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
}


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
