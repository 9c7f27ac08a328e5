"""Readers of the measurements that scripts/build_profiles.py compiles, one a source."""
