"""Quantise two float matrices and multiply them: on a Hopper GPU with CuPy, anywhere with NumPy."""

import numpy as np

import cpgemm
from cpgemm.machine import why_no_hopper

if why_no_hopper() is None:
    import cupy as xp
else:
    xp = np

rng = np.random.default_rng(0)
x = xp.asarray(rng.standard_normal((256, 7168), dtype=np.float32))  # activations, (M, K)
w = xp.asarray(rng.standard_normal((2112, 7168), dtype=np.float32))  # weights, (N, K)

a = cpgemm.quantize(x)  # e4m3 with one scale for 1 x 128 values
b = cpgemm.quantize(w, (128, 128))  # one scale for 128 x 128 values
d = cpgemm.gemm(a, b)  # x @ w.T in bfloat16, shape (256, 2112)

to_host = getattr(xp, "asnumpy", np.asarray)
wanted = to_host(x) @ to_host(w).T
error = np.linalg.norm(to_host(d).astype(np.float32) - wanted) / np.linalg.norm(wanted)
print(f"{type(d).__module__} {d.dtype} {d.shape}, relative error {error:.4f} against float32")
