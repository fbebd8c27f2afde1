"""What `make demo` runs: the public API only, as a user would write it."""
