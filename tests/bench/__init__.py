"""Benchmarks, run by hand (`make bench-gpu`), never collected: ratios to a ceiling or a peer of the same process."""
