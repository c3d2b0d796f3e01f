"""One unit of a stage, in a process of its own: started by runner.py, one row of JSON per line.

python -m bench.gpu.unit STAGE DEVICE ROWS_DESCRIPTOR OPTIONS_JSON UNIT
"""

import json
import os
import sys

# Before anything imports triton: a rehearsal interprets the kernels.
if sys.argv[2] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from bench.gpu.stages import StageOptions, run_unit


def main() -> None:
    stage, device_name, descriptor, options, name = sys.argv[1:]
    if device_name == "cpu":
        from tests.triton_interpreter import repair_interpreter

        repair_interpreter()
        torch.set_num_threads(1)  # tiny tensors only wait for a second one
    fields = json.loads(options)
    fields["without"] = tuple(fields["without"])
    torch.manual_seed(0)
    with os.fdopen(int(descriptor), "w", buffering=1) as rows:
        for row in run_unit(stage, name, torch.device(device_name), StageOptions(**fields)):
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
