"""How the processes of one engine are started, exchange control messages, and end together."""
