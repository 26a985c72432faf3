"""The parts of a vision-language model, its data and its benchmarks."""
