"""A GPU hour in one command: the tests on the device, benchmarks, tuning. Imports measuring; runs the rest as processes."""
