"""LipSDP in cvxpy and eclipse-nn on networks stored as arrays; runs in an interpreter of its own, which has them.

    python -m venv rivals && rivals/bin/pip install torch==2.13.0 cvxpy==1.9.3
    rivals/bin/pip install --no-deps eclipse-nn==0.1.7
    rivals/bin/python benchmarks/network_rivals.py network.npz lipsdp|eclipse|eclipse_fast SECONDS

It is ended after so many seconds of CPU time.

The file holds `reads` and `out`: rows over xi = (x, v_1, v_2, ...) of what each ReLU reads and of the outputs, `inputs`
(the size of x), and for chains the weights `w0`, `w1`, ... Prints one line of JSON. LipSDP-Neuron is written here from
the paper (Fazlyab et al., NeurIPS 2019, Theorem 2, with the corrected diagonal multipliers); nothing of opnorm is used.
"""

import contextlib
import io
import json
import math
import resource
import sys
import time

import numpy as np


def lipsdp(file: dict[str, np.ndarray]) -> dict[str, object]:
    """The least L with `M(T, L^2) <= 0`: for ReLUs, `(y - v)' T v >= 0` with T diagonal."""
    import cvxpy as cp

    reads, out, inputs = file["reads"], file["out"], int(file["inputs"])
    count, size = reads.shape
    select = np.zeros((count, size))
    select[:, inputs:] = np.eye(count)
    first = np.diag((np.arange(size) < inputs).astype(float))
    scale = np.linalg.norm(out.T @ out, 2)
    rho, t = cp.Variable(nonneg=True), cp.Variable(count, nonneg=True)
    half = reads.T @ cp.diag(t) @ select
    matrix = half + half.T - 2 * select.T @ cp.diag(t) @ select - rho * first + out.T @ out / scale
    problem = cp.Problem(cp.Minimize(rho), [(matrix + matrix.T) / 2 << 0])
    problem.solve(solver=cp.CLARABEL)
    value = None if rho.value is None else math.sqrt(float(rho.value) * scale)
    return {"value": value, "status": problem.status}


def eclipse(file: dict[str, np.ndarray], method: str) -> dict[str, object]:
    """The estimate of eclipse-nn from the weights of a chain; its accurate form may fall back to its fast one."""
    import torch
    from eclipse_nn import LipConstEstimator

    weights = [torch.from_numpy(file[f"w{i}"]) for i in range(sum(k[0] == "w" for k in file))]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        value = LipConstEstimator(weights=weights).estimate(method)
    status = "fell back to ECLipsE_Fast" if "Falling back" in said.getvalue() else method
    return {"value": None if value is None else float(value), "status": status}


def main() -> None:
    limit = math.ceil(float(sys.argv[3]))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    file = dict(np.load(sys.argv[1]))
    started = time.process_time()
    which = sys.argv[2]
    names = {"eclipse": "ECLipsE", "eclipse_fast": "ECLipsE_Fast"}
    result = lipsdp(file) if which == "lipsdp" else eclipse(file, names[which])
    print(json.dumps({**result, "seconds": time.process_time() - started}))


if __name__ == "__main__":
    main()
