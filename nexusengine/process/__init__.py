"""How the processes of one engine are tied together: configuration in, events out, and one life."""
