"""Benchmarks: run by hand (`make bench-gpu`), never collected. Every row is a ratio to a ceiling or peer of the same process."""
