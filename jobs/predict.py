"""Run a trained model over an archive as a Ray job, on the cluster that the job runs on.

ray job submit --working-dir . -- python jobs/predict.py /data/runs/first /data/archive.csv --out /data/found

Paths are absolute and on storage that the cluster's nodes share; the last line of output is JSON.
"""

import sys

from ats_stream.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("predict", executor="ray"))
