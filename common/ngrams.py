"""N-grams of many texts counted at once, in time linear in the text but for sorting.

A text is a list of tokens.  A group is a list of texts, such as all outputs to one prompt.
"""
import numpy as np


def ngram_ids(texts, max_n):
    """For n = 1..max_n all n-grams of the texts in order, as two int arrays: `owner`, the text that each
    stands in, and `gram`, a number that is equal for equal n-grams.

    Words become numbers.  An n-gram is the pair of the (n - 1)-gram that starts where it does and its last
    word, and these pairs are numbered anew."""
    flat = [word for text in texts for word in text]
    number = {word: i for i, word in enumerate(dict.fromkeys(flat))}
    ids = np.fromiter(map(number.__getitem__, flat), np.int64, len(flat))
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(ids))   # tokens from here to the text's end
    gram = ids.copy()                                                   # the n-gram that starts here
    for n in range(1, max_n + 1):
        start = np.flatnonzero(left >= n)
        if n > 1:
            pair = gram[start] * len(number) + ids[start + n - 1]
            gram[start] = numbered(pair)
        yield owner[start], gram[start]


def numbered(values):
    """Equal values, ints of at least 0, get equal numbers 0, 1, ...: an array of the same shape (n,).

    Each value is sorted with its place behind it in the same integer: sorting values is several times faster
    than sorting places by them.  Where the two do not fit into 63 bits, places are sorted."""
    n = len(values)
    bits = n.bit_length()
    if int(values.max(initial=0)).bit_length() + bits > 63:
        return np.unique(values, return_inverse=True)[1]
    ordered = np.sort(values << bits | np.arange(n))
    found = np.empty_like(values)
    found[ordered & ((1 << bits) - 1)] = np.cumsum(np.diff(ordered >> bits, prepend=-1) > 0) - 1
    return found


def group_of_text(groups):
    """The group of each text, groups laid end to end: (texts,)."""
    return np.repeat(np.arange(len(groups)), [len(g) for g in groups])


def count_ngrams(groups, max_n=5):
    """Different and all n-grams of each of G groups, and last of all groups together: two float arrays
    (max_n, G + 1), row n - 1 for n."""
    group, size, unique, total = group_of_text(groups), len(groups), [], []
    bits = size.bit_length()
    for owner, gram in ngram_ids([text for g in groups for text in g], max_n):
        code = np.sort(gram << bits | group[owner])
        code = code[np.diff(code, prepend=-1) > 0]          # one for each group that an n-gram is in
        unique.append([*np.bincount(code & ((1 << bits) - 1), minlength=size),
                       np.count_nonzero(np.diff(code >> bits, prepend=-1))])
        total.append([*np.bincount(group[owner], minlength=size), len(gram)])
    return np.array(unique, dtype=float), np.array(total, dtype=float)


def clipped_matches(owner, gram, group):
    """For each text the number of its n-grams that another text of its group has too, each counted at most as
    often as the other text has it: (texts,).  owner, gram: as from `ngram_ids`; group: of each text.

    The largest count of an n-gram in a group, the text that has it, and the second largest count answer for
    every text, so no pair of texts is compared."""
    bits, found = len(group).bit_length(), [(np.zeros(0, int), np.zeros(0))]
    code = np.sort(gram << bits | owner)
    for part in in_parts(code, code >> bits):
        first = np.flatnonzero(np.diff(part, prepend=-1))
        count = np.diff(first, append=len(part))        # of an n-gram in a text, for each such pair
        gram, owner = part[first] >> bits, part[first] & ((1 << bits) - 1)
        # an n-gram in a group; its texts lie together here, because the texts of a group follow each other
        kind = (np.diff(gram, prepend=-1) | np.diff(group[owner], prepend=-1)) != 0
        start = np.flatnonzero(kind)
        kind = kind.cumsum() - 1                        # numbered
        reference = np.maximum.reduceat(count, start)[kind]
        # the first text that has the largest count is held against the second largest count, or against none
        top = np.flatnonzero(count == reference)
        top = top[np.diff(kind[top], prepend=-1) > 0]
        others = count.copy()
        others[top] = 0
        reference[top] = np.maximum.reduceat(others, start)
        found.append((owner, np.minimum(count, reference)))
    owner, count = (np.concatenate(x) for x in zip(*found))
    return np.bincount(owner, count, minlength=len(group))


def in_parts(x, kinds, size=1 << 16):
    """x (n,) in parts of about `size`, which fit the cache, cut only where kinds (n,), sorted, changes."""
    ends = np.searchsorted(kinds, kinds[size::size])
    return [part for part in np.split(x, np.unique(ends)) if len(part)]
