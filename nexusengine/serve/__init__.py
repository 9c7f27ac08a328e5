"""The processes of a running engine: supervisor, worker, and the client of the router."""
