"""Metrics (all names in one table) and logs."""
