"""`infctx fit` in which one rank fails at window 3; how and which is in the environment. For test_nodes."""

import os
import signal
import time

from infctx.cli import main
from infctx.run import FolderCheckpoints
from infctx.training import InfctxModule

RANK, FAULT = int(os.environ["RANK_AT_FAULT"]), os.environ["FAULT"]
SECONDS = 12  # longer than the timeout of a run without a fault
step, save = InfctxModule.training_step, FolderCheckpoints.save_checkpoint


def faulty_step(self, window, index):
    if FAULT == "none" and self.trainer.global_rank == 1 and self.trainer.global_step == 0:
        time.sleep(SECONDS)  # as if kernels were compiled
    if FAULT != "none" and self.trainer.global_rank == RANK and index == 3:
        if FAULT == "sleep":
            time.sleep(1000)
        if FAULT == "error":
            raise FloatingPointError("the loss is nan")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[FAULT])
    return step(self, window, index)


def slow_save(self, checkpoint, path, storage_options=None):
    save(self, checkpoint, path, storage_options)
    if FAULT == "none" and str(path).endswith("step-3"):
        time.sleep(SECONDS)


InfctxModule.training_step, FolderCheckpoints.save_checkpoint = faulty_step, slow_save
main()
