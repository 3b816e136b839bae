"""Train an attention model as a Ray job, on the cluster that the job runs on.

ray job submit --working-dir . -- python jobs/train.py ARCHIVE.csv --out RUN --ranks 2
"""

import sys

from ats_stream.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train", executor="ray"))
