"""Benchmarks: what each stage costs, measured side by side."""
