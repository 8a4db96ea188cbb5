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


def load_encoder(name, device, dtype="fp32"):
    """--encoder -> function of n texts giving an (n, D) array.  name: a checkpoint or a published model,
    whose hidden states embed a text, or sbert:NAME; "", or the default without its file, gives None."""
    if not name or name == "ckpt_sft.pt" and not Path(name).is_file():
        return None
    if not name.startswith("sbert:"):
        model, saved = pretrained.load(name, "--encoder", device, dtype)
        return partial(embed, model, load_tokenizer(saved["tokenizer"]))
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("--encoder sbert: Sentence-BERT needs `pip install sentence-transformers`") from None
    model = SentenceTransformer(name.removeprefix("sbert:"), device=str(device))

    def encode(texts):
        _say_cut(model.tokenizer(list(texts))["input_ids"], model.max_seq_length)
        return model.encode(texts)
    return encode


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
