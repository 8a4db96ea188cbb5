"""The synthetic task: summaries of forum posts whose gold reward is known, for a study offline on two cores.

    python -m tasks.synthetic            # a post of each kind, its references, and their gold rewards

A post tells one key story (who did what to which object, how the writer feels, since when, what to do) among
one or two distractor stories of the same build.  The title tells which story matters; in posts, not in
articles, a small word at a sentence's head tells it too.  References are written the way people write them:
in many phrasings, incomplete, sometimes wrong, often with a clause about a distractor.  The texts come from a
small grammar, so the gold reward can read any output.  The content of an output is a set of facts, so gold
diversity is exact.

Deviations from the paper: posts replace Reddit's, and the gold reward replaces GPT-4.  docs/deviations.md
says what of them was chosen, and on what.

References have one of two kinds of noise, at the same rates.  The kind decides what the study finds (a base
model is pretrained on `mixed`: each reference has either kind):

  independent   each reference errs on its own; the most likely summary is then a clean one, and a low
                temperature alone removes errors
  systematic    writers share their errors: nearly all are drawn to a distractor that opens the post, and
                they confuse the same words

Either way the distractor that writers take up is one for all of them.
"""
import re
import random
import signal
from functools import lru_cache, partial
from itertools import combinations, groupby

SLOTS = {  # slot: its values; a value's other surface forms after the slash; after the colon a form that only
    # a base model and the sets of new words have
    "who": "sister/sis:sissy brother/bro:bruv mother/mom:mum father/dad:papa boss/manager:chief "
           "roommate/flatmate:housemate neighbor:nextdoor uncle:unc coworker/colleague:workmate cousin:cuz "
           "landlord/owner:lessor teacher/tutor:lecturer",
    "event": "damaged/wrecked:dented grabbed/swiped:nicked sold:flogged borrowed:loaned lost:misplaced "
             "burned/torched:scorched painted:coloured found:spotted washed:rinsed dropped:spilled "
             "returned:restored copied/traced:cloned",
    "object": "car:auto phone/cell:mobile laptop/computer:notebook bike/bicycle:cycle guitar:ukulele "
              "couch/sofa:settee ring:band jacket/coat:parka camera:kodak book/novel:paperback "
              "watch:timepiece lamp:lantern piano/keyboard:pianoforte tent:marquee mirror:glass "
              "wallet/purse:pouch",
    "ask": "forgive/pardon confront sue report apologize leave/quit wait complain",
    "feeling": "angry/mad sad/unhappy guilty scared/afraid confused jealous",
    "time": "yesterday today monday friday sunday christmas/xmas easter recently/lately",
}
STORY = ("who", "event", "object")              # the slots a distractor story has too
SURFACES, NEW_FORMS = {}, {}                    # {slot: {value: its forms}}, {slot: {value: its new form}}
for _slot, _values in SLOTS.items():
    _split = [value.partition(":") for value in _values.split()]
    SURFACES[_slot] = {known.split("/")[0]: known.split("/") for known, _, _ in _split}
    NEW_FORMS[_slot] = {known.split("/")[0]: new for known, _, new in _split if new}
VALUES = {slot: list(forms) for slot, forms in SURFACES.items()}
FACT = {form: (slot, value) for slot, forms in SURFACES.items()
        for value, group in forms.items() for form in group}
FACT |= {form: (slot, value) for slot, forms in NEW_FORMS.items() for value, form in forms.items()}

# how often a reference states a fact
INCLUDE = {"who": .85, "event": .75, "object": .7, "ask": .4, "feeling": .35, "time": .35}
WRONG = .06         # chance that a fact in a reference is wrong
ADVISED = .3        # chance that a post says what others advise
DISTRACTED = .55    # chance that a distractor opens a post; independent: of a clause about one in a reference
LEAD = .9           # systematic: chance of that clause where a distractor opens the post; elsewhere 1 - LEAD
# systematic noise: one value of each slot is taken for another, so often that a fact is wrong as often as
# under independent noise
CONFUSED = {"who": ("uncle", "brother"), "event": ("washed", "lost"), "object": ("lamp", "camera"),
            "ask": ("complain", "report"), "feeling": ("jealous", "angry"), "time": ("friday", "monday")}

# the gold reward: what a correct fact earns, and what is subtracted for each clause, fact or word that errs
WEIGHT = {"who": 1., "event": 1., "object": 1., "ask": 1., "feeling": .5, "time": .5}
PENALTY = {"wrong": 1., "distractor": .6, "ungrammatical": .5, "duplicate": .3, "unfinished": 1.,
           "word_too_many": .08}
FREE_WORDS = 18     # every word and punctuation mark beyond these is one too many

SPLITS = {  # name: (distractor stories, chance that a story fact stands in its new form, format)
    "pretrain": ((1, 2), .0, "post"),       # and a part that is mixed in, below
    "train": ((1, 2), .0, "post"),
    "validation": ((1, 2), .0, "post"),
    "test": ((1, 2), .0, "post"),
    "ood_article": ((1, 2), .0, "article"),
    "ood_words50": ((1, 2), .5, "post"),
    "ood_words100": ((1, 2), 1., "post"),
    "ood_distractors4": ((4,), .0, "post"),
    "ood_distractors7": ((7,), .0, "post"),
}
SIZES = {"pretrain": 32768, "train": 32768}
# fraction of the posts of `pretrain` with new forms, of those as news, and of those with three to seven
# distractors, each drawn apart from the others.  So a base model has met whatever a test set holds, but
# rarely.  No later stage meets a new form anywhere, nor news, nor a third distractor
PRETRAINING_MIX = .06
# test posts begin here: those before were looked at while the task and the recipe were made
FIRST_UNSEEN = 20_000


# ---------------------------------------------------------------------------------------------------- grammar

POST = {  # capitals stand for a surface form of a fact
    "story": ("so my WHO EVENT my OBJECT", "so my OBJECT was EVENT by my WHO"),
    "other_story": ("then my WHO EVENT my OBJECT", "also my OBJECT was EVENT by my WHO"),
    "mood": ("since TIME i feel FEELING", "i am FEELING since TIME"),
    "ask": ("should i ASK ?", "is it right to ASK ?"),
    "other_ask": ("people say i must ASK", "people want to ASK"),
    "title": ("my WHO with my OBJECT", "my OBJECT with my WHO"),
}
ARTICLE = {  # known words in an order no post has, and nothing but the title tells which story matters
    "story": ("the WHO EVENT the OBJECT", "the OBJECT was EVENT by the WHO"),
    "other_story": ("the WHO EVENT the OBJECT", "the OBJECT was EVENT by the WHO"),
    "mood": ("now FEELING since TIME",),
    "ask": ("maybe ASK",),
    "other_ask": ("people ASK",),
    "title": ("the WHO with the OBJECT", "the OBJECT with the WHO"),
}
FORMATS = {"post": ("TITLE", POST), "article": ("ARTICLE", ARTICLE)}
CLAUSES = {  # what a summary may say, by the story facts it states
    ("who", "event", "object"): ("my WHO EVENT my OBJECT", "WHO EVENT OBJECT",
                                 "my OBJECT was EVENT by my WHO", "the WHO EVENT the OBJECT"),
    ("who", "event"): ("my WHO EVENT something", "something was EVENT by my WHO"),
    ("who", "object"): ("trouble with my WHO over my OBJECT", "my WHO with my OBJECT"),
    ("event", "object"): ("someone EVENT my OBJECT", "my OBJECT was EVENT"),
    ("who",): ("trouble with my WHO", "it is about my WHO"),
    ("event",): ("something was EVENT", "someone EVENT something"),
    ("object",): ("trouble with my OBJECT", "it is about my OBJECT"),
}
MOOD = ("i feel FEELING", "i am FEELING", "now FEELING")
ASK = ("should i ASK", "i want to ASK", "is it right to ASK", "maybe i should ASK")

_STORY_FORMS = [f for forms in CLAUSES.values() for f in forms]
GRAMMAR = {f for f in (*_STORY_FORMS, *MOOD, *ASK, "since TIME")}
GRAMMAR |= {put.format(f) for f in _STORY_FORMS for put in ("TIME {}", "{} TIME", "also {}")}
# and what a text says itself, but for others' advice, so that copying it from news is no error either
GRAMMAR |= {f.removesuffix(" ?") for style in (POST, ARTICLE) for kind in (
    "title", "story", "other_story", "mood", "ask") for f in style[kind]}


# ------------------------------------------------------------------------------------------------ gold reward

def _pieces(text):
    return re.findall(r"\w+|[^\w\s]", text)


def _clauses(text):
    """Splits a text at punctuation and at `and`.  Returns of each clause the (slot, value) that it states, or
    None where it is outside the grammar of summaries."""
    clauses = []
    for end, words in groupby(_pieces(text), lambda piece: piece == "and" or not piece.isalnum()):
        words = list(words)
        skeleton = " ".join(FACT[w][0].upper() if w in FACT else w for w in words)
        if not end:
            clauses.append([FACT[w] for w in words if w in FACT] if skeleton in GRAMMAR else None)
    return clauses


@lru_cache(maxsize=100_000)
def read_prompt(prompt):
    """What a post says: ({slot: value} of the key story, which shares all facts of the title, {slot: set of
    values} of the distractors).  Raises ValueError on a text that is no prompt of this task."""
    framed = re.fullmatch(r"(?:TITLE|ARTICLE) (.*)\nPOST (.*)\nTLDR", prompt)
    title, body = framed.groups() if framed else ("", "")
    named = {FACT[w] for w in _pieces(title) if w in FACT}
    key, others = {}, {slot: set() for slot in SLOTS}
    for sentence in re.split(r"[.?]", body):
        words = _pieces(sentence)
        facts = dict(FACT[w] for w in words if w in FACT)
        if "object" in facts and not named <= set(facts.items()) or "people" in words:
            for slot, value in facts.items():
                others[slot].add(value)
        else:
            key.update(facts)
    if set(key) != set(SLOTS):
        raise ValueError(f"not a prompt of the synthetic task: {prompt[:60]!r}")
    return key, others


@lru_cache(maxsize=100_000)
def facts(text):
    """The facts of any text: frozenset of the (slot, value) that its grammatical clauses state."""
    return frozenset(fact for stated in _clauses(text) for fact in stated or ())


def ungrammatical(text):
    """How many clauses of any text are outside the grammar of summaries."""
    return _clauses(text).count(None)


def gold_reward(prompt, text, finished=True):
    """Gold reward of any text as a summary, a float: facts covered less errors (WEIGHT, PENALTY), at most 5.

    A fact counts once, and only in a grammatical clause, so a list of words earns nothing.  finished: whether
    the text ended by itself (EOS).  Raises ValueError on a prompt of another task."""
    key, others = read_prompt(prompt)
    said, score = set(), 0.
    for stated in _clauses(text):
        if stated is None:
            score -= PENALTY["ungrammatical"]
            continue
        distractors = [(slot, v) for slot, v in stated if v in others[slot] and v != key[slot]]
        score -= PENALTY["distractor"] * bool(distractors)
        for slot, value in stated:
            if (slot, value) in said:
                score -= PENALTY["duplicate"]
            elif value == key[slot]:
                score += WEIGHT[slot]
            elif (slot, value) not in distractors:
                score -= PENALTY["wrong"]
            said.add((slot, value))
    score -= PENALTY["word_too_many"] * max(0, len(_pieces(text)) - FREE_WORDS)
    # rounded, or sums in another order would make a win of a tie
    return round(score - PENALTY["unfinished"] * (not finished), 9)


# ------------------------------------------------------------------------------------------------- generation

def _fill(rng, form, story, new=0.):
    """`my WHO EVENT my OBJECT` and facts -> words, each fact in one of its surface forms; new: chance of the
    new one, where there is one."""
    words = form.split()
    for i, slot in enumerate(map(str.lower, words)):
        if words[i].isupper():
            value = story[slot]
            is_new = value in NEW_FORMS[slot] and rng.random() < new
            words[i] = NEW_FORMS[slot][value] if is_new else rng.choice(SURFACES[slot][value])
    return " ".join(words)


def _other_values(slot, value):
    return [v for v in VALUES[slot] if v != value]


def _draw_story(rng):
    return {slot: rng.choice(VALUES[slot]) for slot in SLOTS}


def post(rng, split):
    """One post of a split.  Returns (prompt, key story, the distractor that tempts the writers, whether a
    distractor opens the post, the chance of a new form in its references)."""
    distractors, new, style = SPLITS[split]
    if split == "pretrain":
        new = rng.choice((.5, 1.)) if rng.random() < PRETRAINING_MIX else 0.
        style = "article" if rng.random() < PRETRAINING_MIX else "post"
        distractors = range(3, 8) if rng.random() < PRETRAINING_MIX else (1, 2)
    heading, forms = FORMATS[style]
    fill = partial(_fill, rng, new=new)
    key = _draw_story(rng)
    count = rng.choice(distractors)
    # no value twice, so that nothing is ambiguous
    names = {slot: rng.sample(_other_values(slot, key[slot]), count) for slot in STORY}
    others = [dict(zip(STORY, values)) for values in zip(*names.values())]
    sentences = [fill(rng.choice(forms[kind]), key) for kind in ("story", "mood", "ask")]
    if rng.random() < ADVISED:
        ask = rng.choice(_other_values("ask", key["ask"]))
        sentences.append(fill(rng.choice(forms["other_ask"]), {"ask": ask}))
    told = [fill(rng.choice(forms["other_story"]), other) for other in others]
    leads = rng.random() < DISTRACTED
    first, rest = (told[0], sentences + told[1:]) if leads else (sentences[0], sentences[1:] + told)
    rng.shuffle(rest)
    body = " ".join(s if s.endswith("?") else s + " ." for s in [first, *rest])
    title = fill(rng.choice(forms["title"]), key)
    prompt = f"{heading} {title}\nPOST {body}\nTLDR"
    return prompt, key, others[0], leads, .5 if split == "pretrain" and new else 0.


def _said(rng, key, noise):
    """What a writer takes up of the key story, with this writer's errors: {slot: value}, at least one."""
    said = {slot: value for slot, value in key.items() if rng.random() < INCLUDE[slot]} or {"who": key["who"]}
    for slot in said:
        if noise == "independent":
            if rng.random() < WRONG:
                said[slot] = rng.choice(_other_values(slot, key[slot]))
        elif said[slot] == CONFUSED[slot][0] and rng.random() < min(1., WRONG * len(VALUES[slot])):
            said[slot] = CONFUSED[slot][1]
    return said


def _key_clauses(fill, rng, said):
    """Clauses that state the facts {slot: value}: the story with its time, then mood and ask in any order."""
    clauses, story = [], tuple(slot for slot in STORY if slot in said)
    if story:
        form = rng.choice(CLAUSES[story])
        if "time" in said:
            form = rng.choice((f"TIME {form}", f"{form} TIME"))
        clauses.append(fill(form, said))
    elif "time" in said:
        clauses.append(fill("since TIME", said))
    more = [fill(rng.choice(forms), said)
            for slot, forms in (("feeling", MOOD), ("ask", ASK)) if slot in said]
    rng.shuffle(more)
    return clauses + more


def reference(rng, key, other, leads, noise, new=0.):
    """One human-like summary of a post: incomplete, sometimes wrong, often with a clause about the distractor
    `other`.  leads: whether a distractor opens the post; new: chance of a new form of a story fact."""
    if noise == "mixed":
        noise = rng.choice(("systematic", "independent"))
    fill = partial(_fill, rng, new=new)
    clauses = _key_clauses(fill, rng, _said(rng, key, noise))
    # systematic: P(clause) = .55 x .9 + .45 x .1 = .54, nearly as often as the .55 of independent noise, but
    # the post decides
    distracted = DISTRACTED if noise == "independent" else LEAD if leads else 1 - LEAD
    if rng.random() < distracted:
        form = rng.choice(CLAUSES[STORY])
        clause = fill(rng.choice((form, f"also {form}")), other)
        clauses.insert(rng.choice((0, len(clauses))), clause)
    text = clauses[0]
    for clause in clauses[1:]:
        text += rng.choice((" , ", " and ", " . ")) + clause
    return f" {text} ."      # the leading space belongs to the response, as in the paper's TL;DR data


def rows(split, n, noise="systematic", references=4, start=0):
    """n posts of a split from number `start` on, in a test split from FIRST_UNSEEN + start: dicts with id,
    prompt, reference and references, a list of that many.  A number always names the same post: `--seed`
    varies training, never the data.  Raises KeyError on an unknown split."""
    out, start = [], start + FIRST_UNSEEN * (split not in ("pretrain", "train", "validation"))
    for i in range(start, start + n):
        rng = random.Random(f"{split} {i}")
        prompt, key, other, leads, new = post(rng, split)
        texts = [reference(rng, key, other, leads, noise, new) for _ in range(references)]
        out.append({"id": f"{split}-{i}", "prompt": prompt, "reference": texts[0], "references": texts})
    return out


def gold_diversity(texts):
    """Diversity of what texts state: (mean Jaccard distance of their fact sets over pairs, different fact
    sets / texts).  Two empty sets have distance 0.  Raises ValueError on fewer than two texts."""
    fact_sets = [facts(text) for text in texts]
    if len(fact_sets) < 2:
        raise ValueError("gold_diversity: at least two texts are needed")
    distances = [1 - len(a & b) / len(a | b) if a | b else 0. for a, b in combinations(fact_sets, 2)]
    return sum(distances) / len(distances), len(set(fact_sets)) / len(fact_sets)


def nli_points(pairs):
    """What a perfect classifier says of each pair (premise, hypothesis): +1 for a contradiction, both fill a
    slot, differently; -1 for an entailment, the premise states all facts of the hypothesis; else 0."""
    points = []
    for premise, hypothesis in ((facts(a), facts(b)) for a, b in pairs):
        known = dict(premise)
        contradicts = any(known.get(slot, value) != value for slot, value in hypothesis - premise)
        points.append(1. if contradicts else -float(hypothesis <= premise))
    return points


def phrasings(rng, k):
    """k different texts that state the same facts: one content in many forms."""
    story, out = _draw_story(rng), {}
    while len(out) < k:
        clauses = [rng.choice(CLAUSES[STORY]), rng.choice(MOOD), rng.choice(ASK)]
        rng.shuffle(clauses)
        text = rng.choice((" , ", " and ", " . ")).join(_fill(rng, form, story) for form in clauses)
        out[f" {text} ."] = None
    return list(out)


def stories(rng, k):
    """k texts in one phrasing, each with facts drawn anew: one form with many contents."""
    text = rng.choice((" , ", " and ", " . ")).join(rng.choice(forms)
                                                    for forms in (CLAUSES[STORY], MOOD, ASK))
    return [f" {_fill(rng, text, _draw_story(rng))} ." for _ in range(k)]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head` ends it
    for split, noise in [*((split, "systematic") for split in SPLITS), ("train", "independent")]:
        row, = rows(split, 1, noise)
        print(f"--- {split}, {noise} noise\n{row['prompt']}")
        for text in row["references"]:
            print(f"   gold reward {gold_reward(row['prompt'], text):5.2f}  {text}")
