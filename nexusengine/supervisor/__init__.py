"""The process that starts router, server and workers, restarts what dies, and leaves nothing behind."""
