# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""Vocabulary and tasks of the bundled model. Standard library only; an episode is a function of its task, seed and length.

A token is one word, one number (0 to 99) or one punctuation sign; text is lower case with spaces between tokens.
"""

import hashlib
import random

NAMES = ("adam alice amy anna ben carl clara dan ella emma eric eva frank fred george grace henry ida jack jane john "
         "kate leo lily lucy mark mary max nina noah olga oscar paul peter rosa ruth sam sara tom will").split()

ACTIONS = {
    "bakes": "bread cakes pies rolls",
    "waters": "roses plants lilies beans",
    "reads": "poems novels papers tales",
    "paints": "boats doors fences portraits",
    "feeds": "birds ducks horses cats",
    "sells": "fish cheese honey eggs",
    "writes": "letters songs stories plays",
    "plants": "trees onions tulips herbs",
    "cooks": "soup rice noodles stew",
    "draws": "maps faces houses clouds",
    "picks": "apples berries pears plums",
    "carries": "wood stones bricks hay",
    "mends": "nets shoes coats roofs",
    "builds": "walls bridges towers kites",
    "cleans": "windows floors tables pots",
    "counts": "stars coins sheep ships",
    "studies": "history music physics law",
    "collects": "shells stamps leaves feathers",
    "visits": "friends museums castles markets",
    "drinks": "tea coffee milk juice",
    "washes": "shirts dishes carts socks",
    "teaches": "chess dance math swimming",
    "buys": "lamps books chairs flowers",
    "grinds": "corn wheat pepper salt",
}
ACTIONS = {verb: nouns.split() for verb, nouns in ACTIONS.items()}
THINGS = [noun for nouns in ACTIONS.values() for noun in nouns]

ADJECTIVES = "old young quiet grey small brown wild gentle".split()
ANIMALS = "dog fox hare goat wolf bear mouse crow".split()
ACTS = "sleeps waits walks rests sings hides runs plays".split()
PLACES = "river forest hill village garden lake mill road".split()
WEATHER = "rains snows clears thaws".split()
TIMES = "morning evening spring summer autumn winter night afternoon".split()

CONTROL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
GRAMMAR = (". , : ? the a in near is it of and to from on day days every other write diary start code what does do like "
           "likes remember keep note list").split()

DAYS = 40  # day numbers; codes use the numbers above, so that the two are never confused
NUMBERS = [str(n) for n in range(100)]


def _vocabulary():
    words = CONTROL + NUMBERS + GRAMMAR + NAMES + list(ACTIONS) + THINGS
    words += ADJECTIVES + ANIMALS + ACTS + PLACES + WEATHER + TIMES
    return list(dict.fromkeys(words))


WORDS = _vocabulary()
IDS = {word: token for token, word in enumerate(WORDS)}
VOCABULARY_SHA256 = hashlib.sha256("\n".join(WORDS).encode()).hexdigest()


def encode(text):
    return [IDS[word] for word in text.split()]


def decode(tokens):
    text = " ".join(WORDS[token] for token in tokens)
    for sign in ".,:?":
        text = text.replace(f" {sign}", sign)
    return text


class Episode:
    """A prompt, its reference response and the answers in it that are scored."""

    def __init__(self, task, prompt):
        self.task = task
        self.prompt = [BOS] + encode(prompt)
        self.response = []
        self.weights = []  # of the loss, one per response token
        self.checks = []

    def say(self, text, weight=0.0):
        tokens = encode(text)
        self.response += tokens
        self.weights += [weight] * len(tokens)

    def answer(self, kind, text, tail, anchor, entry=-1, depth=-1, weight=0.3):
        """Appends a scored answer and, not scored, its tail. The first word decides which fact is meant: weight 1."""
        self.checks.append(dict(kind=kind, entry=entry, depth=depth, at=len(self.response), n=len(text.split()),
                                anchor=encode(anchor)))
        self.say(text, weight)
        self.weights[self.checks[-1]["at"]] = 1.0
        self.say(tail, weight)

    def end(self, weight):
        self.response.append(EOS)
        self.weights.append(weight)

    def __len__(self):
        return len(self.prompt) + len(self.response)


def _people(rng, count):
    """count distinct (name, verb, noun); verbs are distinct too, so that each word leads to the next."""
    return [f"{name} {verb} {rng.choice(ACTIONS[verb])}"
            for name, verb in zip(rng.sample(NAMES, count), rng.sample(list(ACTIONS), count))]


class Plan:
    """Instructions for the days first..last and what they say of a day: once before range, periodic and default."""

    def __init__(self, rng, first, last, once, ranges, periods):
        self.first, self.last = first, last
        deeds = iter(_people(rng, once + ranges + periods + 1))
        self.once = {day: next(deeds) for day in rng.sample(range(first, last + 1), once)}
        self.ranges = [(a, a + n - 1, next(deeds)) for a, n in self._spans(rng, ranges)]
        self.periods = [(rng.randrange(3, 8), next(deeds)) for _ in range(periods)]
        self.default = next(deeds)

    def _spans(self, rng, count):
        """Disjoint spans of 3 to 6 days."""
        spans = []
        while len(spans) < count:
            n = rng.randrange(3, 7)
            a = rng.randrange(self.first, max(self.first + 1, self.last - n + 2))
            if all(a + n <= b or b + m <= a for b, m in spans):
                spans.append((a, n))
        return spans

    def rules(self, rng):
        rules = [f"on day {day} {deed} ." for day, deed in self.once.items()]
        rules += [f"from day {a} to day {b} {deed} ." for a, b, deed in self.ranges]
        rules += [f"every {p} days {deed} ." for p, deed in self.periods]
        rules += [f"on other days {self.default} ."]
        rng.shuffle(rules)
        return " ".join(rules)

    def request(self):
        return f"write the diary of day {self.first} to day {self.last} :"

    def entry(self, day):
        if day in self.once:
            return "once", self.once[day]
        for a, b, deed in self.ranges:
            if a <= day <= b:
                return "range", deed
        for p, deed in self.periods:
            if day % p == 0:
                return "periodic", deed
        return "default", self.default

    def write(self, episode):
        for day in range(self.first, self.last + 1):
            header = f"on day {day}"
            episode.say(header, 0.3)
            kind, deed = self.entry(day)
            episode.answer(kind, deed, ".", header, entry=day)


def _plan(rng, room, fixed):
    """A plan whose prompt and response take at most `room` tokens."""
    if fixed:
        once, ranges, periods = rng.randrange(5, 9), 2, 1
    elif room < 72:
        once, ranges, periods = 1, rng.randrange(2), 0
    else:
        once, ranges, periods = rng.randrange(1, 3 + room // 64), rng.randrange(2 if room < 200 else 3), rng.randrange(2)
    spoken = 7 * once + 10 * ranges + 7 * periods + 7 + 12
    most = min(DAYS, (room - spoken) // 7)
    days = most if fixed else rng.randrange(max(2, most * 7 // 10), most + 1)
    if most == DAYS:  # every long diary ends with the same day: the model need not compare it with the request
        first = DAYS - days + 1
    else:
        first = 1 if rng.random() < 0.3 else rng.randrange(1, DAYS - days + 2)
    return Plan(rng, first, first + days - 1, min(once, days), ranges if days >= 16 else min(ranges, 1), periods)


def diary(rng, length, fixed):
    plan = _plan(rng, length, fixed)
    episode = Episode("diary", f"{plan.rules(rng)} {plan.request()}")
    plan.write(episode)
    episode.end(3.0)
    return episode


def _filler(rng):
    form = rng.randrange(4)
    if form == 0:
        return f"the {rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)} {rng.choice(ACTS)} near the {rng.choice(PLACES)} ."
    if form == 1:
        return f"in the {rng.choice(TIMES)} a {rng.choice(ANIMALS)} {rng.choice(ACTS)} ."
    if form == 2:
        return f"it {rng.choice(WEATHER)} in the {rng.choice(TIMES)} ."
    return f"the {rng.choice(PLACES)} is {rng.choice(ADJECTIVES)} ."


def _scatter(rng, facts, room):
    """facts in order at random places between filler sentences; at most `room` tokens. Returns text and depths."""
    filler, left = [], room - sum(len(fact.split()) for fact in facts)
    while True:
        sentence = _filler(rng)
        left -= len(sentence.split())
        if left < 0:
            break
        filler.append(sentence)
    slots = sorted(rng.randrange(len(filler) + 1) for _ in facts)
    text, depths, done = [], [], 0
    for fact, slot in zip(facts, slots):
        text += " ".join(filler[done:slot]).split()
        depths.append(len(text))
        text += fact.split()
        done = slot
    text += " ".join(filler[done:]).split()
    return " ".join(text), [depth / len(text) for depth in depths]


def _codes(rng, count):
    return {name: f"{rng.randrange(DAYS + 2, 100)} {rng.randrange(DAYS + 2, 100)}" for name in rng.sample(NAMES, count)}


def _ask(episode, kind, questions, wanted):
    """questions: (text, answer, depth). The first may already stand at the end of the prompt."""
    for i, (text, answer, depth) in enumerate(questions):
        if i > 0 or wanted:
            episode.say(text)
        episode.answer(kind, answer, ".", text, depth=depth, weight=1.0)
    episode.end(0.3)


def passkey(rng, length, fixed):
    names = list(_codes(rng, rng.randrange(2, 5) if fixed else rng.randrange(1, 7)).items())
    if length < 96:
        names = names[:2]
    asked = rng.sample(range(len(names)), len(names) if fixed else rng.randrange(1, len(names) + 1))
    facts = [f"the code of {name} is {code} ." for name, code in names]
    text, depths = _scatter(rng, facts, length - 2 - 10 * len(asked))
    questions = [(f"what is the code of {names[i][0]} ?", names[i][1], round(depths[i], 3)) for i in asked]
    episode = Episode("passkey", text + " " + questions[0][0])
    _ask(episode, "passkey", questions, False)
    return episode


def recall(rng, length, fixed):
    count = rng.randrange(20, 33) if fixed else rng.randrange(2, max(3, min(len(NAMES) - 6, length // 12)))
    names, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    asked = rng.sample(range(count), min(count, 12, (length - 16 - 5 * count) // 7) if fixed else
                       min(count, rng.randrange(1, 13), max(1, (length - 8 - 5 * count) // 8)))
    facts = [f"{name} likes {thing} ." for name, thing in zip(names, things)]
    text, depths = _scatter(rng, facts, length - 2 - 7 * len(asked))
    questions = [(f"what does {names[i]} like ?", things[i], round(depths[i], 3)) for i in asked]
    episode = Episode("recall", text + " " + questions[0][0])
    _ask(episode, "recall", questions, False)
    return episode


def requery(rng, length, fixed):
    codes = list(_codes(rng, 3 if fixed else rng.randrange(1, 4 if length >= 160 else 2)).items())
    asked = rng.sample(range(len(codes)), len(codes))
    plan = _plan(rng, length - 18 * len(codes), fixed)
    facts = " ".join(f"the code of {name} is {code} ." for name, code in codes)
    episode = Episode("requery", f"{facts} {plan.rules(rng)} {plan.request()}")
    plan.write(episode)
    if fixed:
        episode.checks.clear()
    questions = [(f"what is the code of {codes[i][0]} ?", codes[i][1], round((1 + 8 * i) / len(episode), 3)) for i in asked]
    _ask(episode, "requery", questions, True)
    return episode


def drill_facts(rng, length, fixed):
    """Training only: few facts, stated again and again, so that nearly every one of them can be recalled."""
    names = rng.sample(NAMES, rng.randrange(2, max(3, min(20, length // 16))))
    form = rng.choice(["likes", "code", "day", "day"])
    if form == "likes":
        facts = {f"{name} likes": rng.choice(THINGS) for name in names}
    elif form == "code":
        facts = {f"the code of {name} is": code for name, code in zip(names, _codes(rng, len(names)).values())}
    else:
        days = rng.sample(range(1, DAYS + 1), len(names))
        facts = {f"on day {day}": deed for day, deed in zip(days, _people(rng, len(names)))}
    episode = Episode("drill", "")
    seen = set()
    while True:
        fact = rng.choice(list(facts))
        if len(episode) + len(f"{fact} {facts[fact]} .".split()) > length:
            return episode
        episode.say(fact)
        if fact in seen:
            episode.answer("drill", facts[fact], ".", fact)
        else:
            episode.say(f"{facts[fact]} .")
        seen.add(fact)


def drill_rules(rng, length, fixed):
    """Training only: entries of a diary in any order, so that the entry before is no help."""
    plan = Plan(rng, 1, DAYS, rng.randrange(1, 3 + length // 64), rng.randrange(1, 2 if length < 128 else 3), 1)
    episode = Episode("rules", plan.rules(rng))
    edges = [day for a, b, _ in plan.ranges for day in (a - 1, a, b, b + 1) if 1 <= day <= DAYS]
    groups = [list(plan.once), range(plan.periods[0][0], DAYS + 1, plan.periods[0][0]), edges, range(1, DAYS + 1)]
    groups += [range(a, b + 1) for a, b, _ in plan.ranges]
    while len(episode) + 7 <= length:
        day = rng.choice(rng.choice(groups))
        kind, deed = plan.entry(day)
        episode.say(f"on day {day}")
        episode.answer(kind, deed, ".", f"on day {day}", entry=day)
    return episode


TASKS = {"diary": diary, "passkey": passkey, "recall": recall, "requery": requery, "drill": drill_facts, "rules": drill_rules}


def episode(task, seed, length, fixed=False):
    """`fixed` draws from the narrower, harder distribution of the evaluation."""
    return TASKS[task](random.Random(f"{task}/{seed}/{length}"), length, fixed)
