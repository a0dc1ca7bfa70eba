"""What the process tests run in children; imported by the fork server before it forks them."""

import os
import signal

import torch
import transformers
from tiny import gpt2_rm
from training import id_pairs, text_pairs, trainer

from rgtg_fast.training import PreferenceDataset

KILLED_AT = 5


class Kill(transformers.TrainerCallback):
    """No clean-up, no flush: what a machine that goes away does."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(path, callbacks=(), **changes):
    torch.set_num_threads(1)
    trained = trainer(
        path,
        gpt2_rm(initializer_range=0.1),
        text_pairs(12),
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        disable_dropout=False,  # so that the random state must be restored too
        lr_scheduler_type="linear",
        **changes,
    )
    for callback in callbacks:
        trained.add_callback(callback)
    return trained


def train_until_killed(path, sampling):
    resumable(path, [Kill()], train_sampling_strategy=sampling).train()


def outcome(trained):
    history = [h for h in trained.state.log_history if "loss" in h]
    losses = {(h["step"], name): h[name] for h in history for name in ("loss", "accuracy")}
    return losses, {n: p.detach() for n, p in trained.model.named_parameters()}


def resume(path, sampling, out):
    trained = resumable(path, train_sampling_strategy=sampling)
    trained.train(resume_from_checkpoint=True)
    torch.save(outcome(trained), out)


def data_parallel(rank, port, path, out):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    trained = parallel_trainer(path, 2, ddp_backend="gloo")
    trained.train()
    metrics = trained.evaluate()
    if rank == 0:
        torch.save((*outcome(trained), metrics), out)
    # Taking the group down has hung a rank whose peer was gone already: both are done here, and go.
    torch.distributed.barrier()
    os._exit(0)


def parallel_trainer(path, batch, **changes):
    return trainer(
        path,
        gpt2_rm(initializer_range=0.1).double(),
        PreferenceDataset(id_pairs(12)),
        evaluate=PreferenceDataset(id_pairs(5, seed=7)),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.5,
        **changes,
    )
