"""Proofs that take longer than a test may: kill tests, soaks, the suites of peers, mutation. README.md says how they are run and written."""
