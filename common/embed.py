"""Models that read texts for the measures: encoders and a classifier of entailment.  Sentence-BERT and the
classifier need `pip install sentence-transformers`, which brings transformers.
"""
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.tokenizer import load_tokenizer
from model import plain
from published import pretrained

TEXTS_AT_ONCE, PAIRS_AT_ONCE = 256, 64
NLI_POINTS = {"CONTRADICTION": 1., "NEUTRAL": 0., "ENTAILMENT": -1.}
UNFINISHED = 0.25       # similarity that an output loses which did not end


@torch.no_grad()
def embed(model, tokenizer, texts):
    """Mean of the last hidden states over each text's tokens: (n, D) array.  A text is cut at the model's
    context; an empty one is embedded as EOS."""
    device, found, limit = model.device, [], model.config.context
    ids = [tokenizer.encode_ordinary(text) or [tokenizer.eot_token] for text in texts]
    _say_cut(ids, limit)
    ids = [row[:limit] for row in ids]
    for i in range(0, len(ids), TEXTS_AT_ONCE):
        part = ids[i:i + TEXTS_AT_ONCE]
        hidden = model(plain(part, device))                                             # (B, S, D)
        lengths = torch.tensor([len(row) for row in part], device=device)
        mask = torch.arange(hidden.shape[1], device=device) < lengths[:, None]          # (B, S)
        mean = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]                    # (B, D)
        found.append(mean.float().cpu().numpy())
    return np.concatenate(found)


def _say_cut(ids, limit):
    """Prints how many texts the encoder does not read to their end."""
    cut = sum(len(row) > limit for row in ids)
    if cut:
        print(f"{cut} of {len(ids)} texts are longer than the {limit} tokens that the encoder reads: what "
              "follows does not count as diversity", flush=True)


def load_encoder(name, device, dtype="fp32", flag="--encoder", task=None):
    """--encoder -> function of n texts giving an (n, D) array.  name: a checkpoint or a published model,
    whose hidden states embed a text, or sbert:NAME; "", or the default without its file, gives None, and so
    does the default of another task than that of the texts, a name or None."""
    if not name or name == "ckpt_sft.pt" and not Path(name).is_file():
        return None
    if not name.startswith("sbert:"):
        model, saved = pretrained.load(name, flag, device, dtype)
        if name == "ckpt_sft.pt" and task and saved["task"] and saved["task"]["name"] != task:
            print(f"ckpt_sft.pt is of task {saved['task']['name']}, the samples of {task}")
            return None
        return partial(embed, model, load_tokenizer(saved["tokenizer"]))
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(f"{flag} sbert: Sentence-BERT needs `pip install sentence-transformers`") from None
    model = SentenceTransformer(name.removeprefix("sbert:"), device=str(device))

    def encode(texts):
        _say_cut(model.tokenizer(list(texts))["input_ids"], model.max_seq_length)
        return model.encode(texts, show_progress_bar=False)
    return encode


def similarity(encode, reference, outputs):
    """How near outputs come to what a person wrote: cosine similarity of each output's embedding and the
    reference's, minus UNFINISHED where an output did not end, a list.  A fixed judge, as Gao et al. (2022)
    have one: it knows the reference, which no policy and no reward model sees.  encode: as from
    `load_encoder`; outputs: (text, finished) pairs."""
    u = encode([reference, *(text for text, _ in outputs)])                             # (1 + n, D)
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    return [float(x @ u[0]) - UNFINISHED * (not finished) for x, (_, finished) in zip(u[1:], outputs)]


def load_nli(name, device):
    """--nli -> function of [(premise, hypothesis)] giving an (n,) array: the points of each pair's likeliest
    label (NLI_POINTS) times its probability.  Raises UserError on a classifier of other labels."""
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise UserError("--nli: NLI diversity needs `pip install transformers`") from None
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
    labels = [model.config.id2label[i].upper() for i in range(model.config.num_labels)]
    if set(labels) != set(NLI_POINTS):
        raise UserError(f"--nli {name}: its labels are {', '.join(labels)}, not {', '.join(NLI_POINTS)}")
    points_of_label = torch.tensor([NLI_POINTS[label] for label in labels], device=device)

    @torch.no_grad()
    def points(pairs):
        found = []
        for i in range(0, len(pairs), PAIRS_AT_ONCE):
            premises, hypotheses = map(list, zip(*pairs[i:i + PAIRS_AT_ONCE]))
            encoded = tokenizer(premises, hypotheses, padding=True, truncation=True, max_length=512,
                                return_tensors="pt")
            probability, label = model(**encoded.to(device)).logits.softmax(-1).max(-1)
            found.append((probability * points_of_label[label]).cpu().numpy())
        return np.concatenate(found)
    return points
