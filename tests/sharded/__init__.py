"""Sharded steps beside unsharded ones: gloo ranks of one machine in CI, NCCL ranks under torchrun."""
