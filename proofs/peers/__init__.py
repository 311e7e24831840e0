"""The proof by other people's tests; see `__main__`."""
