"""The worker process: one engine core on one device, connected to the router."""
