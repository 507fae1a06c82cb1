"""Where questions come from: files, data sets, benchmarks by name."""
