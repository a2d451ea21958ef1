"""Models: load, adapt, pre-train, evaluate, export.

Importing this package costs nothing; its parts import torch and transformers when they are asked for.
"""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then asks for kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
