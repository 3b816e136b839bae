"""Train an attention model as a Ray job, on the cluster that the job runs on.

ray job submit --working-dir . -- python jobs/train.py /data/archive.csv --out /data/runs/first --ranks 2

Paths are absolute and on storage that the cluster's nodes share; the last line of output is JSON.
"""

import sys

from ats_stream.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", executor="ray"))
