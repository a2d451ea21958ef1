"""`python -m benchmarks.models`: what the house makes of tiny random models of many families (`command`)."""

import logging
import os
import sys
import warnings

# One thread, and no question to the hub, set before any library reads it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.command_line import run_benchmark
from benchmarks.models.command import Benchmark

# What libraries say of missing kernels is no finding, and why a sum took the reference path stands in its line.
warnings.filterwarnings("ignore")
logging.getLogger("transformers").setLevel(logging.ERROR)
logging.getLogger("fedsim.gradients").propagate = False
sys.exit(run_benchmark(Benchmark))
