"""Checkpoints and the states that a killed run continues from: read with weights only, checked by a hash.

A checkpoint holds kind (lm or reward), config, tokenizer, task, arguments, metrics, weights and their hash,
by which samples remember which reward model their policy was trained against.
"""
import hashlib
import io
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from common import dist
from common.errors import UserError
from common.files import atomic_write
from common.flags import DTYPES
from model import GPT, GPTConfig

MADE_BY = {"lm": "python sft.py", "reward": "python reward.py --model ckpt_sft.pt",
           "ckpt_ppo.pt": "python ppo.py --model ckpt_sft.pt"}


def read_checked(path):
    """The dict that torch.save wrote.  Raises ValueError on a changed byte, which torch does not notice."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():        # compares the checksum of every part
            raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def weights_hash(state):
    """A name for weights, {name: tensor}: a hash of their bytes, 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def save_checkpoint(path, model, spec, task, args, metrics):
    """spec: of the tokenizer; task, args, metrics: dicts of plain values."""
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    _write(path, dict(kind="reward" if model.scalar else "lm", config=asdict(model.config), tokenizer=spec,
                      task=task, args=args, metrics=metrics, weights_hash=weights_hash(state), state=state))


def _write(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path, kind, flag="--model", device="cpu", dtype="fp32"):
    """(GPT, the checkpoint's dict without its weights).  Raises UserError on a missing or damaged file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; `{MADE_BY.get(path.name, MADE_BY[kind])}` makes one")
    try:
        saved = read_checked(path)
        model = GPT(GPTConfig(**saved["config"]), scalar=saved["kind"] == "reward")
        state = saved.pop("state")
        if weights_hash(state) != saved["weights_hash"]:
            raise ValueError("these are not the weights that were saved")
        model.load_state_dict(state)
    except Exception as error:  # without torch's own message, which may advise to load the file unsafely
        raise UserError(f"{flag} {path}: not a checkpoint of this project, or damaged "
                        f"({type(error).__name__})") from None
    if saved["kind"] != kind:
        raise UserError(f"{flag} {path}: a checkpoint of kind {saved['kind']!r}; {kind!r} is needed here")
    return model.to(device).compute_in(DTYPES[dtype]), saved


# --------------------------------------------------------------------------------- states of interrupted runs

def save_state(path, name, step, state, rng, optimizer, models):
    """What a run needs to continue after `step`: name, the hash of its flags and inputs; state, what the loop
    carries from step to step; and of models, {name: GPT}, the trained parameters."""
    trained = {name: {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
               for name, model in models.items()}
    _write(path, _full_tensors({"name": name, "step": step, "state": state, "rng": rng.get_state(),
                                "optimizer": optimizer and optimizer.state_dict(), "models": trained}))


def _full_tensors(x):
    """Nested dicts with their tensors on the CPU and unsharded."""
    if isinstance(x, dict):
        return {k: _full_tensors(v) for k, v in x.items()}
    return dist.unshard(x).cpu() if isinstance(x, torch.Tensor) else x


def load_state(path, name, rng, optimizer, models):
    """Puts a saved state back into rng, optimizer and models.  Returns (steps done, what the loop carried),
    or None if the state belongs to a run with other flags or inputs.  Raises UserError on a damaged state."""
    try:
        saved = read_checked(path)
        if saved["name"] != name:
            return None
        for key, model in models.items():
            params = dict(model.named_parameters())
            model.load_state_dict({k: dist.shard_like(x, params[k]) for k, x in saved["models"][key].items()},
                                  strict=False)
        if optimizer:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {i: {k: dist.shard_like(x, params[i]) if x.dim() else x for k, x in of.items()}
                       for i, of in saved["optimizer"]["state"].items()}
            optimizer.load_state_dict(saved["optimizer"] | {"state": moments})
        rng.set_state(saved["rng"])
        return saved["step"], saved["state"]
    except Exception as error:      # whatever a damaged file makes torch raise
        raise UserError(f"{path}: a damaged state ({type(error).__name__}); remove it to start "
                        "anew") from None
