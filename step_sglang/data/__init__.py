"""Where questions come from: files, data sets, the benchmarks by name."""
