"""Weights in fewer bits: how matrices are rounded, what a recipe says of it, how a graph reads them.

Weight-only: activations keep the bundle's floating-point type, and none is looked at. Knows matrices and graphs; writes
no bundle. Needs no torch.
"""
