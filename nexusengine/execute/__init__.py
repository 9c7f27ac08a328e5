"""Running a step on a device. `base` and `batch` are the contract, `factory` makes executors; none imports torch."""
