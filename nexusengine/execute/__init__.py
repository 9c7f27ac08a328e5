"""Running a step on a device. `batch` and `base` are the contract (no torch); each executor is imported when chosen."""
