"""The study of the CABS paper: data sets, nets, the training run and the benchmarks."""
