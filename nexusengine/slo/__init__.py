"""PURE: service level objectives: classes by name, when a token is due, and whether an objective was met."""
