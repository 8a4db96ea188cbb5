"""What the paper's reviewers asked for, as the numbers in reviewers.json.

    python reproduce.py --full           # runs it, resumable; also writes reviewers.md and figures/

    shift      how far is each test set from train, and does RLHF's advantage grow with it?  study/growth.py
    proxies    which diversity measure tracks what outputs say?                              study/proxies.py
    frontier   is PPO more than SFT at a lower temperature, or best-of-N?                    study/frontier.py
    seeds      what the claims' intervals owe to the choice of seeds                         study/claims.py
    instruct   the same study in a second task, whose shift is composition                   study/instruct.py
    kinds      of bad outputs, or of good ones: which kind of diversity is lost              study/kinds.py
    methods    which method keeps diversity, and what becomes of it out of distribution      study/methods.py
    opt        the claims on a base model of OPT's kind
    paper      the paper's claims row by row, and whether ours agree                         study/paper.py
"""
import json

import numpy as np

from study import claims, frontier, growth, instruct, kinds, methods, paper, proxies
from study.measures import Measures
from study.names import OPT


def numbers(measures, folder, settings, cost, stated):
    """Everything in reviewers.json.  folder: of the stages, whose name stands for settings and code; stated:
    the claims."""
    seeds = measures.seeds
    paths = [folder / f"seed{s}" / "synthetic" / "conditions.json" for s in seeds]
    conditions = [json.loads(path.read_text()) for path in paths]
    found = {"settings": settings | {"seeds": seeds}, "study": folder.name, "cost": cost,
             "shift": growth.numbers(measures, folder),
             "proxies": proxy_tests(conditions),
             "frontier": frontier.numbers(frontier.read_seeds(folder, seeds)),
             "seeds": {"claims": stated} | claims.seeds_matter(stated),
             "instruct": instruct.numbers(folder, seeds),
             "kinds": kinds.numbers(measures, folder),
             "methods": methods.numbers(folder, seeds),
             "opt": claims.claims_of(Measures(folder, seeds, [OPT]), OPT,
                                     (claims.of_generalisation, claims.of_diversity, claims.of_best_of_n))}
    return found | {"paper": paper.numbers(measures, found)}


def proxy_tests(seeds):
    """The tests of study.proxies over the conditions of all seeds.  seeds: conditions.json of each."""
    conditions = [c for seed in seeds for c in seed["conditions"]]
    # of the form test (value, low, high) over sets, means over seeds, because only the encoder differs
    # between seeds
    form = {m: np.mean([seed["form"][m] for seed in seeds], axis=0).tolist() for m in seeds[0]["form"]}
    return {"tests": proxies.all_tests(conditions, form)}
