"""Kernels in C for CPUs: built at first use, and what Python needs to call them."""
