"""The Python API: `Engine` and `AsyncEngine`, and the clients that connect them and the server to an engine core."""
