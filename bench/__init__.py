"""Benchmarks against torch.nn, and the list of workloads that they share with the tests."""
