"""LENS, the default policy: `policy.Lens` plans a step, the other modules hold one rule each."""
