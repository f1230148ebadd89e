"""The engine core: decides what each step computes. Nothing here imports torch."""
