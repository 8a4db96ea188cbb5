"""A second synthetic task, instruction following, whose shift is composition: "do A", then "do A, then B".

    python -m tasks.instructions         # an instruction of each kind, its references, and their gold rewards

An instruction asks for one of four deeds: name things of a kind, describe a thing, choose from a list,
reverse a list.  Fine-tuning sees single deeds only.  Test sets ask for a known deed on a kind of thing it was
never asked for, and for two or three deeds in a row.  As in the first task (synthetic.py), references are
incomplete and sometimes wrong, and their writers like to repeat the example that an instruction gives.

Deviations from the paper: this replaces AlpacaFarm, AlpacaEval and Sequential Instructions, and its gold
reward replaces GPT-4.  In a base model's split, `pretrain`, one instruction in four is composed or of an
unseen pair, because a published model has met "then" too; no split to train on has three deeds in a row.  The
weights of the gold reward were fixed before any policy was trained.  The base model's fraction of
compositions was raised once, after a pilot whose base model could not do them.
"""
import re
import random
from functools import lru_cache

from tasks import synthetic

KINDS = {
    "animal": "dog cat cow horse goat duck frog lion bear wolf",
    "food": "bread rice soup cheese apple cake egg honey corn pear",
    "tool": "hammer saw drill knife rope brush nail spade axe pump",
    "place": "park farm shop school beach river forest bridge tower market",
    "job": "cook nurse pilot farmer baker judge singer miner tailor guard",
}
KINDS = {kind: items.split() for kind, items in KINDS.items()}
KIND = {item: kind for kind, items in KINDS.items() for item in items}
QUALITIES = {  # what can be said of every thing of a kind: six words each
    "animal": "wild furry hungry young loud quick",
    "food": "sweet fresh warm cheap salty soft",
    "tool": "sharp heavy rusty cheap loud useful",
    "place": "quiet busy green wide old famous",
    "job": "young famous quick busy useful old",
}
QUALITIES = {kind: set(words.split()) for kind, words in QUALITIES.items()}
ALL_QUALITIES = sorted(set().union(*QUALITIES.values()))
COUNTS = {"two": 2, "three": 3, "four": 4}
DEEDS = ("name", "describe", "choose", "reverse")
# none of `choose`: whether its kind stood among the wrong things of other lists, or did not, would tell it.
# All that is said of jobs is said of other kinds too, so that no word of an answer is unknown
HELD_OUT = {("name", "tool"), ("describe", "job"), ("reverse", "place")}
SEEN = {deed: [kind for kind in KINDS if (deed, kind) not in HELD_OUT] for deed in DEEDS}

SPLITS = {  # name: (deeds in a row, whether each is a pair of deed and kind that fine-tuning never sees)
    "pretrain": (1, False),     # and a part that is mixed in, below
    "train": (1, False),
    "validation": (1, False),
    "test": (1, False),
    "ood_pairs": (1, True),
    "ood_then2": (2, False),
    "ood_then3": (3, False),
}
SIZES = {"pretrain": 32768, "train": 32768}
PRETRAINING_MIX = 1 / 4     # of the instructions of `pretrain`: two deeds in a row, or an unseen pair
# prompts of `test`, from its first on, that no split to learn from has; there are so few different ones that
# most would stand in train too.  Those of unseen pairs may stand in `pretrain`
TESTED = 100

# how often a reference leaves out a thing, says or chooses a wrong one, repeats the example, forgets to
# reverse or forgets a later deed
LEFT_OUT, WRONG, LURED, FORGOTTEN = .25, .08, .5, .15
WORTH = 3.      # of a deed done in full
PENALTY = {"wrong": 1., "example": .6, "duplicate": .3, "surplus": .5, "ungrammatical": .5, "unfinished": 1.,
           "word_too_many": .08}
FREE_WORDS = 14     # for each deed asked for; every word and punctuation mark beyond these is one too many

ASKED = {
    "name": ("name COUNT KINDs", "list COUNT KINDs", "give me COUNT KINDs",
             "name COUNT KINDs such as EXAMPLE", "list COUNT KINDs like EXAMPLE"),
    "describe": ("describe a ITEM", "what is a ITEM like", "say two things about a ITEM", "how is a ITEM",
                 "tell me about a ITEM", "say what a ITEM is like"),
    "choose": ("choose a KIND from ITEMS", "which of ITEMS is a KIND"),
    "reverse": ("reverse ITEMS", "say ITEMS backwards"),
}
JOINED = (" , then ", " and then ", " . then ")     # between deeds asked for


# ---------------------------------------------------------------------------------------------- what is asked

def _pieces(text):
    return re.findall(r"\w+|[^\w\s]", text)


def _ask(rng, deed, kind):
    """(the wording of a deed, {"deed", "kind", ...})."""
    text = rng.choice(ASKED[deed])
    own, others = KINDS[kind], [item for item in KIND if KIND[item] != kind]
    asked = {"deed": deed, "kind": kind}
    if deed == "name":
        count, asked["example"] = rng.choice(list(COUNTS)), rng.choice(own) if "EXAMPLE" in text else ""
        text = text.replace("COUNT", count).replace("EXAMPLE", asked["example"])
        asked["count"] = COUNTS[count]
    elif deed == "describe":
        asked["item"] = rng.choice(own)
        text = text.replace("ITEM", asked["item"])
    else:
        right = rng.choice((1, 2))
        if deed == "reverse":
            items = rng.sample(own, 3)
        else:       # choose: one or two right among four
            items = rng.sample(own, right) + rng.sample(others, 4 - right)
        rng.shuffle(items)
        asked["items"] = items
        text = text.replace("ITEMS", " ".join(items))
    return text.replace("KIND", kind), asked


@lru_cache(maxsize=100_000)
def read_prompt(prompt):
    """What an instruction asks for: a tuple of deeds, dicts with deed, kind and what it takes.  Raises
    ValueError on a text that is no prompt of this task."""
    if not (prompt.startswith("INSTRUCTION ") and prompt.endswith("\nRESPONSE")):
        raise ValueError(f"not a prompt of the instruction task: {prompt[:60]!r}")
    parts = prompt.removeprefix("INSTRUCTION ").removesuffix("\nRESPONSE").split("then ")
    return tuple(_read_deed(part) for part in parts)


def _read_deed(part):
    words, items, kinds, counts = _read_words(part)
    first, last = (words[0], words[-1]) if words else ("", "")
    if first in ("name", "list", "give") and kinds and counts:
        return {"deed": "name", "kind": kinds[0], "count": counts[0], "example": items[0] if items else ""}
    if first in ("choose", "which") and kinds and items:
        return {"deed": "choose", "kind": kinds[0], "items": items}
    if (first == "reverse" or last == "backwards") and items:
        return {"deed": "reverse", "kind": KIND[items[0]], "items": items}
    if len(items) == 1:
        return {"deed": "describe", "kind": KIND[items[0]], "item": items[0]}
    raise ValueError(f"not a prompt of the instruction task: {part[:60]!r}")


def _read_words(part):
    """(words, the things among them, the kinds, the counts) of a part of an instruction."""
    words = [w for w in _pieces(part) if w.isalpha() and w != "and"]
    items = [w for w in words if w in KIND]
    kinds = [w.removesuffix("s") for w in words if w.removesuffix("s") in KINDS]
    return words, items, kinds, [COUNTS[w] for w in words if w in COUNTS]


# ------------------------------------------------------------------------------------------------ gold reward

_ITEM, _QUALITY = rf"(?:{'|'.join(KIND)})", rf"(?:{'|'.join(ALL_QUALITIES)})"
_THING, _QUALITIES = rf"(?:(?:a|the) )?{_ITEM}", rf"{_QUALITY}(?: and {_QUALITY})*"
GRAMMAR = {  # what an answer to each deed looks like
    "name": rf"{_THING}(?:(?: ,| and) {_THING})*",
    "choose": rf"(?:i choose )?{_THING}",
    "reverse": rf"{_ITEM}(?: {_ITEM})+",
    "describe": rf"a {_QUALITIES} {_ITEM}|the {_ITEM} is {_QUALITIES}|it is {_QUALITIES}",
}
GRAMMAR = {deed: re.compile(pattern) for deed, pattern in GRAMMAR.items()}


def _answers(text):
    """The answers a text gives, in order, as strings: it is cut at full stops and at `then`."""
    parts = re.split(r"\.|\bthen\b", " ".join(_pieces(text)))
    answers = [re.sub(r"^(and\b|[ ,])+|(\band|[ ,])+$", "", part) for part in parts]
    return [answer for answer in answers if answer]


def facts(text):
    """The facts of any text, a frozenset: (kind or "quality", word) for each word of its grammatical answers,
    and ("order", neighbours) where an answer is nothing but a row of words."""
    said = set()
    for answer in _answers(text):
        if any(g.fullmatch(answer) for g in GRAMMAR.values()):
            words = [w for w in answer.split() if w in KIND or w in ALL_QUALITIES]
            said |= {(KIND.get(w, "quality"), w) for w in words}
            if GRAMMAR["reverse"].fullmatch(answer):
                said |= {("order", pair) for pair in zip(words, words[1:])}
    return frozenset(said)


def _score_name(asked, answer):
    items = [w for w in answer.split() if w in KIND]
    good = {w for w in items if KIND[w] == asked["kind"] and w != asked["example"]}
    score = WORTH * min(asked["count"], len(good)) / asked["count"] - _repeats(items)
    score -= PENALTY["wrong"] * sum(KIND[w] != asked["kind"] for w in set(items))
    score -= PENALTY["example"] * (asked["example"] in items)
    return score - PENALTY["surplus"] * max(0, len(set(items)) - asked["count"])


def _score_describe(asked, answer):
    words = answer.split()
    items, said = [w for w in words if w in KIND], [w for w in words if w in ALL_QUALITIES]
    good = {w for w in said if w in QUALITIES[asked["kind"]]}
    score = WORTH * min(2, len(good)) / 2 - PENALTY["wrong"] * sum(w not in good for w in said)
    return score - PENALTY["wrong"] * (items not in ([], [asked["item"]])) - _repeats(said)


def _score_choose(asked, answer):
    item = next(w for w in answer.split() if w in KIND)     # the grammar allows one
    return WORTH if item in asked["items"] and KIND[item] == asked["kind"] else -PENALTY["wrong"]


def _score_reverse(asked, answer):
    items, right = answer.split(), asked["items"][::-1]
    hits = sum(a == b for a, b in zip(items, right))
    misses = max(len(items), len(right)) - hits
    return WORTH * hits / len(right) - PENALTY["wrong"] * misses / len(right)


SCORES = {"name": _score_name, "describe": _score_describe, "choose": _score_choose,
          "reverse": _score_reverse}


def _score(asked, answer):
    """The score of one answer to one deed: at most WORTH."""
    if not GRAMMAR[asked["deed"]].fullmatch(answer):
        return -PENALTY["ungrammatical"]
    return SCORES[asked["deed"]](asked, answer)


def _repeats(words):
    return PENALTY["duplicate"] * (len(words) - len(set(words)))


def gold_reward(prompt, text, finished=True):
    """Gold reward of a response, a float: up to WORTH (3) for each deed asked for, less errors (PENALTY).

    Every text gets a reward.  The first answer is scored against the first deed, and so on; a deed without an
    answer earns nothing, an answer without a deed counts as ungrammatical.  finished: whether the text ended
    by itself (EOS).  Raises ValueError on a prompt of another task."""
    deeds, answers = read_prompt(prompt), _answers(text)
    score = sum(_score(asked, answer) for asked, answer in zip(deeds, answers))
    score -= PENALTY["ungrammatical"] * max(0, len(answers) - len(deeds))
    score -= PENALTY["word_too_many"] * max(0, len(_pieces(text)) - FREE_WORDS * len(deeds))
    return round(score - PENALTY["unfinished"] * (not finished), 9)     # or sums would make a win of a tie


def gold_diversity(texts):
    """As `synthetic.gold_diversity`, of the facts above."""
    return synthetic.gold_diversity_of([facts(text) for text in texts])


# ------------------------------------------------------------------------------------------------- generation

def _errs(rng):
    return rng.random() < WRONG


def _answer_name(rng, asked):
    others = [w for w in KINDS[asked["kind"]] if w != asked["example"]]
    items = [w for w in rng.sample(others, asked["count"]) if rng.random() >= LEFT_OUT]
    items = items or [rng.choice(others)]
    wrong = [kind for kind in SEEN["name"] if kind != asked["kind"]]
    items = [rng.choice(KINDS[rng.choice(wrong)]) if _errs(rng) else w for w in items]
    if asked["example"] and rng.random() < LURED:
        items[rng.randrange(len(items))] = asked["example"]
    article = rng.choice(("", "a ", "the "))
    items = [article + w for w in items]
    return " and ".join(([" , ".join(items[:-1])] if items[1:] else []) + items[-1:])


def _answer_describe(rng, asked):
    good = QUALITIES[asked["kind"]]
    wrong = [w for w in ALL_QUALITIES if w not in good]
    words = rng.sample(sorted(good), rng.choice((1, 1, 2)))
    words = " and ".join(rng.choice(wrong) if _errs(rng) else w for w in words)
    form = rng.choice(("a {} ITEM", "the ITEM is {}", "it is {}"))
    return form.format(words).replace("ITEM", asked["item"])


def _answer_choose(rng, asked):
    errs = _errs(rng)
    items = [w for w in asked["items"] if (KIND[w] == asked["kind"]) != errs]
    return rng.choice(("{}", "the {}", "i choose the {}")).format(rng.choice(items))


def _answer_reverse(rng, asked):
    return " ".join(asked["items"] if rng.random() < FORGOTTEN else asked["items"][::-1])


ANSWERS = {"name": _answer_name, "describe": _answer_describe, "choose": _answer_choose,
           "reverse": _answer_reverse}


def reference(rng, deeds):
    """One human-like response to an instruction: incomplete, sometimes wrong.  A writer who forgets a deed
    has forgotten those behind it too."""
    text = ""
    for i, asked in enumerate(deeds):
        if i and rng.random() < FORGOTTEN:
            break
        text += rng.choice((" , then ", " . then ", " . ")) if i else ""
        text += ANSWERS[asked["deed"]](rng, asked)
    return f" {text} ."


def _pairs(rng, split):
    """The deeds of an instruction, each with a kind of thing, as a split has them: [(deed, kind)]."""
    count, held_out = SPLITS[split]
    if split == "pretrain" and rng.random() < PRETRAINING_MIX:
        count, held_out = rng.choice(((2, False), (1, True)))
    known = [(deed, kind) for deed in DEEDS for kind in KINDS if ((deed, kind) in HELD_OUT) == held_out]
    return [rng.choice(known) for _ in range(count)]


def _instruction(rng, pairs):
    """(prompt, its deeds)."""
    texts, deeds = zip(*(_ask(rng, deed, kind) for deed, kind in pairs))
    text = texts[0] + "".join(rng.choice(JOINED) + more for more in texts[1:])
    return f"INSTRUCTION {text} .\nRESPONSE", deeds


def _content(deeds):
    """What is asked for, beside deed and kind and whatever the wording."""
    return [(asked.get("count"), asked.get("item"), bool(asked.get("example"))) for asked in deeds]


@lru_cache(maxsize=1)
def _tested():
    """The prompts of `test` that no other split has."""
    return {row["prompt"] for row in rows("test", TESTED, references=1)}


def rows(split, n, noise="usual", references=4, start=0):
    """n instructions of a split from number `start` on, in a test split from FIRST_UNSEEN + start: dicts with
    id, prompt, reference and references, a list of that many.  There is one kind of noise.

    A number always names the same instruction: `--seed` varies training, never the data.  In a test split a
    prompt comes again only where a thousand draws found no other.  Raises KeyError on an unknown split."""
    tests = synthetic.is_test(split)
    first = synthetic.FIRST_UNSEEN if tests else start
    taken, out = set() if tests else _tested(), []
    for i in range(first, first + n + start * tests):
        rng = random.Random(f"instruction {split} {i}")
        pairs = _pairs(rng, split)
        prompt, deeds = _instruction(rng, pairs)
        content = _content(deeds)
        for _ in range(1000):
            # content stays in splits to learn from, so that each is as frequent as in `test`
            if prompt not in taken and (tests or _content(deeds) == content):
                break
            prompt, deeds = _instruction(rng, pairs)
        if tests:
            taken.add(prompt)
        written = [reference(rng, deeds) for _ in range(references)]
        out.append({"id": f"{split}-{i}", "prompt": prompt, "reference": written[0], "references": written})
    return out[len(out) - n:]


if __name__ == "__main__":
    for name in SPLITS:
        for row in rows(name, 2 if name == "test" else 1):
            print(f"--- {name}\n{row['prompt']}")
            for text in row["references"]:
                print(f"   gold reward {gold_reward(row['prompt'], text):5.2f}  {text}")
