"""fedray, by its one public call; arguments are overrides, such as backend.name=serial.

python -m contenders.fedray [key=value ...]
"""

import os
import sys
import tempfile
from pathlib import Path

from components import configuration
from work import given, write

from fedray import run

work = given()
values = configuration(work, os.environ["SPEED_SOURCE"]) | {"trackers": [{"name": "components.stamps"}]}
with tempfile.TemporaryDirectory() as folder:
    record = run(values, sys.argv[1:], Path(folder) / "run").record
    stamps = [float(line) for line in (record.path / "stamps").read_text().split()]
rounds = [line for line in record.metrics if line["round"] > 0]
write(
    [line["phases"]["sample"] + line["phases"]["train"] for line in rounds],
    stamps[len(record.metrics) - len(rounds)],
    {line["round"]: line["test_loss"] for line in rounds if "test_loss" in line},
)
