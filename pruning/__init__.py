"""Network slimming: sparsity of BatchNorm scales, selection of channels, surgery, cost."""
