"""The engine loop: drain, plan, execute, apply. No torch and no sockets: the executor is behind a contract."""
