"""The policies that LENS is compared with; any of them can be served with `--scheduler`."""
