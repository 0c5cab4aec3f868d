"""Rank sweeps against full fine-tuning."""
