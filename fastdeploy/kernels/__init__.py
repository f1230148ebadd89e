"""Fused kernels; a file holds the torch reference and the Triton kernel of one operation."""
