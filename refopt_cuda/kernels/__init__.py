"""The templates that run a rule over codecs: raw CUDA, Numba on a CPU, Numba-CUDA. Nothing here imports torch."""
