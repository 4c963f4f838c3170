"""Floor 3: the only autograd of the library, and the checks before it."""

from . import flops  # noqa: F401  (registers the formulas)
