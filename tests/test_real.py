"""The same scripts on real posts and instructions, from folders built outside the repository; skipped where
the texts are absent."""
import gzip
import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import bon
import diversity
import generalisation
import model as M
import ppo
import reward
import sft
from common import pretrained
from common.stats import spearman
from common.tokenizer import load_tokenizer, published_spec
from conftest import ROOT
from test_tokenizer import ODD

REAL = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "real"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(),
                                reason=f"no real texts at {REAL}; REAL_DATA=DIR names another folder")


def lines(name):
    path = REAL / name
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write(folder, name, rows):
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def tldr(folder):
    posts = lines("summ/tldr_openai_format.jsonl.gz")

    def prompt(r):
        return f"SUBREDDIT: r/{r['subreddit']}\nTITLE: {r['title']}\nPOST: {r['post']}\nTL;DR:"
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        write(folder, name,
              [{"id": r["id"], "prompt": prompt(r), "reference": r["summary"]} for r in posts
               if r["split"] == split])
    write(folder, "ood_news",
          [{"prompt": f"ARTICLE: {r['document']}\nTL;DR:", "reference": r["summary"]}
           for r in lines("summ/cnn_dailymail_subset.jsonl.gz")])
    judged = [r for r in posts if r["gpt4_preferred"]]

    def pick(r, won):
        return r["model_summary"] if (r["gpt4_preferred"] == "ours") == won else r["summary"]
    write(folder, "preferences",
          [{"prompt": prompt(r), "chosen": pick(r, True), "rejected": pick(r, False)} for r in judged])
    return "ood_news"


def instructions(folder):
    head = ("Below is an instruction that describes a task{}. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\n{}\n\n")

    def prompt(r):
        given = f"### Input:\n{r['input']}\n\n" if r.get("input") else ""
        return head.format(", paired with an input that provides further context" if given else "",
                           r["instruction"]) + given + "### Response:"
    rows = [{"prompt": prompt(r), "reference": r["output"]}
            for r in lines("instruct/llamafactory_alpaca_en_999.jsonl.gz")]
    write(folder, "train", rows[:800])
    write(folder, "validation", rows[800:900])
    write(folder, "test", rows[900:])
    write(folder, "ood_user",
          [{"prompt": prompt(r), "reference": r["output"]}
           for r in lines("instruct/user_oriented_252.jsonl.gz")])
    write(folder, "ood_sequential",
          [{"prompt": prompt(r), "reference": r["output"]}
           for r in lines("instruct/sequential_seed_42.jsonl")])
    pairs = lines("prefs/alpacafarm_gpt4_claude_pairs.jsonl.gz")[:600]
    write(folder, "preferences",
          [{"prompt": prompt(r), "chosen": r["chosen"], "rejected": r["rejected"]} for r in pairs])
    return "ood_user"


@pytest.mark.slow
@pytest.mark.parametrize("build", [tldr, instructions])
def test_the_whole_chain_on_real_text(build, tmp_path, capfd):
    far = build(tmp_path)
    same = dict(quiet=True, threads=2, out=str(tmp_path))
    sft.main(sft.Config(data=str(tmp_path), rows=64, context=256, n_words=1000, **same))
    reward.main(reward.Config(model=str(tmp_path / "ckpt_sft.pt"), prompts=64, held_out=32, **same))
    ppo.main(ppo.Config(model=str(tmp_path / "ckpt_sft.pt"), reward=str(tmp_path / "ckpt_reward.pt"), steps=1,
                        batch_size=8, **same))
    for name, scored in (("sft", str(tmp_path / "ckpt_reward.pt")), ("ppo", "")):
        bon.main(bon.Config(model=str(tmp_path / f"ckpt_{name}.pt"), reward=scored, inputs=4, n=2, **same))
    files = [str(p) for p in sorted(tmp_path.glob("samples_*.jsonl"))]
    generalisation.main(generalisation.Config(files=files, out=str(tmp_path)))
    diversity.main(diversity.Config(files=files, encoder=str(tmp_path / "ckpt_sft.pt"), out=str(tmp_path)))
    said = capfd.readouterr().out
    assert "cut on the left" in said        # these prompts are longer than a context of 256
    judged = json.loads((tmp_path / "generalisation.json").read_text())["rouge"]
    assert {r["split"] for r in judged} >= {"test", far}
    measured = json.loads((tmp_path / "diversity.json").read_text())["results"]
    assert {r["policy"] for r in measured} == {"sft", "bon", "ppo"}


def test_a_real_llama_writes_a_story(tmp_path):
    """stories260K, from llama2.c's format to a Hugging Face directory, read by pretrained.from_pretrained."""
    raw = (REAL / "weights/stories260K/stories260K.bin").read_bytes()
    d, ff, layers, heads, kv, vocab, context = struct.unpack("7i", raw[:28])
    flat, place = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0

    def take(*shape):
        nonlocal place
        place += math.prod(shape)
        return flat[place - math.prod(shape):place].view(shape)

    # llama2.c interleaves the two rotary halves of a head, Hugging Face keeps them apart
    def halves(w, n):
        return w.view(n, -1, 2, d).transpose(1, 2).reshape(w.shape)
    e = d // heads
    order = [("embed", take(vocab, d)), ("input_layernorm", take(layers, d)),
             ("self_attn.q_proj", take(layers, d, d)),
             ("self_attn.k_proj", take(layers, kv * e, d)), ("self_attn.v_proj", take(layers, kv * e, d)),
             ("self_attn.o_proj", take(layers, d, d)), ("post_attention_layernorm", take(layers, d)),
             ("mlp.gate_proj", take(layers, ff, d)), ("mlp.down_proj", take(layers, d, ff)),
             ("mlp.up_proj", take(layers, ff, d)), ("norm", take(d))]
    state = {"model.embed_tokens.weight": order[0][1], "model.norm.weight": order[-1][1]}
    for name, stacked in order[1:-1]:
        for i, w in enumerate(stacked):
            n = {"self_attn.q_proj": heads, "self_attn.k_proj": kv}.get(name)
            state[f"model.layers.{i}.{name}.weight"] = halves(w, n) if n else w
    pretrained.write_safetensors(tmp_path / "model.safetensors",
                                 {k: v.contiguous() for k, v in state.items()})
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        rms_norm_eps=1e-5,
        num_key_value_heads=kv, intermediate_size=ff, vocab_size=vocab, max_position_embeddings=context,
        tie_word_embeddings=True)))
    model = pretrained.from_pretrained(str(tmp_path))
    pieces, raw, at = [], (REAL / "weights/stories260K/tok512.bin").read_bytes(), 4
    while at < len(raw):    # score, length, bytes
        n, = struct.unpack("i", raw[at + 4:at + 8])
        pieces.append(raw[at + 8:at + 8 + n].decode("utf-8", "replace"))
        at += 8 + n
    (story,), = M.generate(model, [[1]], 120, temperature=0)
    text = "".join(pieces[i] for i in story)
    assert text.lstrip().startswith("Once upon a time, there was a little girl named Lily."), text
    assert len(set(story)) > 30         # and no loop


SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(not SMOLLM2, reason="SMOLLM2=DIR names a Hugging Face directory of SmolLM2-135M-Instruct")
def test_smollm2_scores_a_sentence_and_its_tokenizer_equals_transformers():
    model, saved = pretrained.load(SMOLLM2)
    tokenizer = load_tokenizer(saved["tokenizer"])
    text = "The quick brown fox jumps over the lazy dog. Paris is the capital of France."
    ids = tokenizer.encode_ordinary(text)
    packed = M.pack([ids[:1]], [[ids[1:]]])
    with torch.no_grad():
        assert abs(-M.log_probs(model, model(packed), packed).mean() - 3.20) < 0.01
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    texts = [r["post"] for r in lines("summ/tldr_openai_format.jsonl.gz")[:500]]
    texts += [r["document"] for r in lines("summ/cnn_dailymail_subset.jsonl.gz")[:250]]
    texts += [r["chosen"] for r in lines("prefs/alpacafarm_gpt4_claude_pairs.jsonl.gz")[:250]]
    texts += [r["chosen"] for r in lines("prefs/alpacafarm_gpt4_claude_pairs.jsonl.gz")
              if not r["chosen"].isascii()]
    for text in texts + ODD:
        assert tokenizer.encode_ordinary(text) == theirs(text)["input_ids"]


def test_gpt2_s_published_files_give_tiktoken_s_ids(tmp_path, monkeypatch):
    """The vocabulary and merges that OpenAI published, read as a Hugging Face directory, against tiktoken's
    gpt2."""
    cache = tmp_path / "cache"
    # a mismatch would be deleted
    shutil.copytree(REAL / "tiktoken_cache", cache, copy_function=shutil.copyfile)
    cache.chmod(0o755)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for path in cache.iterdir():
        shutil.copyfile(path, tmp_path / ("vocab.json" if path.read_bytes()[:1] == b"{" else "merges.txt"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 50256}')
    ours, theirs = load_tokenizer(published_spec(tmp_path)), tiktoken.get_encoding("gpt2")
    texts = [r["post"] for r in lines("summ/tldr_openai_format.jsonl.gz")[:600]]
    texts += [r["document"] for r in lines("summ/cnn_dailymail_subset.jsonl.gz")[:400]] + ODD
    assert ours.eot_token == theirs.eot_token and ours.n_vocab == theirs.n_vocab
    for text in texts:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode_ordinary(text) and ours.decode(ids) == text


def test_length_control_orders_models_by_what_they_are_worth():
    """Real lengths of published models' answers; a judge with a known taste for quality and for length."""
    answers = [r["outputs"] for r in lines("instruct/alpaca_eval_805_6models.jsonl.gz")]
    base, rng, raw, fair = "text_davinci_003", np.random.default_rng(0), {}, {}
    models = {m for of_row in answers for m in of_row} - {base}

    def longer(m):
        return np.array([[len(o[m]) - len(o[base])] for o in answers if m in o and base in o], dtype=float)
    by_length = sorted(models, key=lambda m: -longer(m).mean())
    worth = dict(zip(by_length, np.linspace(-.8, .8, len(by_length))))      # the longer, the less worth
    for m in by_length:
        more = longer(m)
        chance = 1 / (1 + np.exp(-worth[m] - 2 * np.tanh(more / more.std())))
        won = rng.random(more.shape) < chance
        raw[m], fair[m] = won.mean(), generalisation.length_controlled(won, more)
        assert fair[m].low < 1 / (1 + np.exp(-worth[m])) < fair[m].high, m
    of_worth = list(worth.values())
    assert spearman([f.mean for f in fair.values()], of_worth) > spearman(list(raw.values()), of_worth) + .3
