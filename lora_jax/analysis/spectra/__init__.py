"""Singular values of weight changes."""
