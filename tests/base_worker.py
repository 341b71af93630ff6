"""One process of a small base training, for tests with several: `python base_worker.py '{"steps": 2, ...}'`.

    steps     updates to do; or
    until     the step to train to, with a checkpoint after each
    shard     "none" or "fsdp2"
    folder    of the checkpoint and the results
    validate  true: after every step, and twice in the end, the second time without anything that was kept
    bf16      true: compute in bfloat16
    resume    go on from the newest checkpoint there, if any
    die, by   rank of the process that is gone after the first step, and the signal that does it
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import torch
from base_run import CONFIG, make_run

from selva.models import winograd_conv
from selva.training.base.checkpoint import Checkpoints, find_checkpoint, load_
from selva.utils.distributed import join_world
from selva.utils.logging import setup_logging
from selva.utils.watch import watched


def main(job: dict) -> None:
    torch.set_num_threads(1)
    setup_logging(False)
    folder = Path(job["folder"])
    with join_world(torch.device("cpu")) as world, watched(world):
        precision, dtype = ("bf16", torch.bfloat16) if job.get("bf16") else ("fp32", torch.float32)
        run = make_run(dataclasses.replace(CONFIG, shard=job.get("shard", "none"), precision=precision), world, dtype)
        checkpoints = Checkpoints(folder, world, 0, {})
        if job.get("resume"):
            path = find_checkpoint("auto", folder)
            if path is not None:
                load_(run, path)
        checkpoints.clean()
        losses, norms, ids = [], [], []
        draw = run.stream.draw

        def drawn():
            step = draw()
            ids.append([name for part in step.parts for name in part.batch.ids])
            return step

        run.stream.draw = drawn
        last = job.get("until", run.step + job.get("steps", 0))
        while run.step < last:
            loss, norm = run.train_step()
            losses.append(loss.item())
            norms.append(norm.item())
            if job.get("validate"):
                run.validate()
            if "until" in job:
                checkpoints.save(run)
            if job.get("die") == world.rank:
                os.kill(os.getpid(), getattr(signal, job["by"]))
        bins = run.validate()["val_loss_bins"]
        if job.get("validate"):
            winograd_conv.forget()
            assert run.validate()["val_loss_bins"] == bins
        checkpoints.save(run)
        checkpoints.wait()
        weights, average = run.weights(), run.weights(1)
        (folder / f"ids_{world.rank}.json").write_text(json.dumps(ids))
        if world.is_main:
            torch.save({"weights": weights, "average": average, "losses": losses, "norms": norms, "bins": bins},
                       folder / "result.pt")
        run.stream.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)
