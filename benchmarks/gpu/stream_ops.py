"""Do writes and waits of a stream reach the host's memory here? What CPU assistance on a GPU relies on.

    python benchmarks/gpu/stream_ops.py

Ends in one JSON line; exits with 1 where they do not, and the modes with CPU assistance act as `pipelined`.
"""

import argparse
import json
import sys

import torch

from toppings.assist.cuda_stream_ops import failure_reason, unavailable_reason


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_known_args()
    reason = "there is no GPU" if not torch.cuda.is_available() else unavailable_reason() or failure_reason()
    print(json.dumps({"benchmark": "stream_ops", "works": not reason, "reason": reason}))
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
