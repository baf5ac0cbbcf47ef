"""torch's own CPU kernels for its tensors in float32, one file per op family: in the pool of threads that the rest of a torch
model uses. In float64 the definition computes, in 16 bits the NumPy kernels, which are quicker."""
