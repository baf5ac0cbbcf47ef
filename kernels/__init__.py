"""Hand-written kernels: one folder per language, one file per op family. They import nothing of gpulayers above them."""
