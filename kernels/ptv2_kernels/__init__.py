"""Triton kernels of ptv2-fast; imports torch and triton only."""
