"""Measures blocklib beside Debian's qemu-img, in the same run and interleaved: `make bench`, or `python -m benchmarks.run`."""
