"""PURE: placement policies. Views of the workers go in, the worker for one request comes out."""
