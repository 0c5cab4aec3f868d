"""Whole tasks in a few calls: what the command line runs."""
