"""Phases of gpu_check.py that are longer than a few lines, and what they share."""
