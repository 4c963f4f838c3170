"""Floor 3: the only autograd of the library, and the checks before it."""
