"""The OpenAI-compatible HTTP server: pydantic at this edge only, no torch."""
