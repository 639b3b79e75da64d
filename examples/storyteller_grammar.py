"""The grammar behind the bundled storyteller: little stories with a mood that can be steered.

A story has a hero, a topic (sea, forest, city, mountain) and a mood, joyful or gloomy. The same
sentence patterns serve both moods; only the words in their mood slots differ. So the mood is a
hidden state that a model must keep from sentence to sentence, and nothing but those words tells
a joyful story from a gloomy one.

    >>> import random
    >>> text = story(random.Random(7))
    >>> 0.0 <= joyful_share(text) <= 1.0
    True
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

MOODS: dict[str, dict[str, tuple[str, ...]]] = {
    "joyful": {
        "sky": ("bright", "golden", "warm", "clear", "sunny"),
        "wind": ("gentle", "soft", "mild", "sweet"),
        "fair": ("lovely", "beautiful", "cheerful", "sparkling", "pleasant"),
        "heart": ("happy", "glad", "joyful", "hopeful", "merry"),
        "kind": ("kind", "friendly", "smiling", "generous"),
        "manner": ("happily", "gladly", "merrily", "cheerfully", "joyfully"),
        "cried": ("laughed", "sang", "cheered", "smiled", "giggled"),
        "went": ("skipped", "danced", "bounded", "raced", "whirled"),
        "force": ("joy", "delight", "hope", "laughter", "happiness"),
        "glow": ("sunshine", "starlight", "sparkle"),
        "gift": ("treasure", "rose", "cake", "kite", "harp"),
    },
    "gloomy": {
        "sky": ("grey", "dark", "cold", "stormy", "bleak"),
        "wind": ("bitter", "icy", "harsh", "raw"),
        "fair": ("ruined", "dreary", "gloomy", "desolate", "lonely"),
        "heart": ("sad", "weary", "frightened", "miserable", "hopeless"),
        "kind": ("cruel", "grim", "pale", "ragged"),
        "manner": ("sadly", "bitterly", "wearily", "miserably", "gloomily"),
        "cried": ("wept", "sighed", "groaned", "trembled", "moaned"),
        "went": ("trudged", "crept", "stumbled", "limped", "shuffled"),
        "force": ("sorrow", "grief", "fear", "despair", "misery"),
        "glow": ("fog", "gloom", "shadow"),
        "gift": ("grave", "skull", "thorn", "ghost", "coffin"),
    },
}
"""For each mood, the words of each mood slot. No word belongs to both moods."""

TOPICS: dict[str, dict[str, tuple[str, ...]]] = {
    "sea": {
        "place": ("harbour", "beach", "lighthouse", "island"),
        "things": ("waves", "boats", "shells", "nets"),
        "person": ("sailor", "fisherman", "captain", "pirate"),
        "animal": ("gull", "dolphin", "crab", "seal"),
    },
    "forest": {
        "place": ("clearing", "brook", "cabin", "pond"),
        "things": ("trees", "ferns", "leaves", "mushrooms"),
        "person": ("hunter", "woodcutter", "ranger", "witch"),
        "animal": ("fox", "owl", "deer", "hare"),
    },
    "city": {
        "place": ("market", "square", "bridge", "station"),
        "things": ("streets", "roofs", "lamps", "houses"),
        "person": ("baker", "tailor", "painter", "clerk"),
        "animal": ("cat", "pigeon", "dog", "horse"),
    },
    "mountain": {
        "place": ("valley", "summit", "cave", "pass"),
        "things": ("rocks", "cliffs", "peaks", "slopes"),
        "person": ("shepherd", "miner", "hermit", "guide"),
        "animal": ("goat", "eagle", "bear", "wolf"),
    },
}
"""For each topic, its nouns. No noun belongs to two topics."""

HEROES = {
    "she": ("Mara", "Anna", "Elise", "Ruth"),
    "he": ("Tom", "Jonas", "Felix", "Emil"),
}
PRONOUNS = {
    "she": {"he": "she", "his": "her", "him": "her"},
    "he": {"he": "he", "his": "his", "him": "him"},
}
TIMES = ("morning", "afternoon", "evening", "night")
KIN = ("brother", "sister", "mother", "father")

NEUTRAL_OPENINGS = (
    "One [time], [hero] walked to the [place].",
    "Once upon a time, [hero] lived near the [place] with [his] [kin].",
    "This is a story about [hero] and a [person].",
    "Early in the [time], [hero] came to the [place].",
    "[hero] and [his] [kin] stood by the [place].",
    "Long ago, [hero] worked for a [person] near the [place].",
)
MOOD_OPENINGS = (
    "It was a [sky] [time], and [hero] felt [heart].",
    "On a [sky] [time], [hero] [went] to the [place].",
    "The [sky] [time] filled [hero] with [force].",
    "[hero] was [heart], for the [time] was [sky].",
    "There was [force] in the air when [hero] came to the [place].",
    "Once upon a time, [hero] lived [manner] near a [fair] [place].",
)
STAGES: tuple[tuple[str, ...], ...] = (
    (
        "The sky above the [things] was [sky], and the air was full of [force].",
        "A [wind] wind blew over the [things], and [hero] [cried].",
        "The [glow] lay over the [place], and all the [things] looked [fair].",
        "All around, the [things] were [sky] and [fair].",
        "The [place] was [fair] that [time], and the wind was [wind].",
    ),
    (
        "[he] [went] past the [fair] [things] and [cried].",
        "[he] [went] [manner] to the [other].",
        "So [hero] [went] through the [sky] [time] to a [fair] [other].",
        "Step by step, [he] [went] on, full of [force].",
        "[he] took [his] [kin] by the hand, and they [went] [manner] on.",
    ),
    (
        "There [he] met a [kind] [person] who [cried] [manner].",
        "A [kind] [person] came out of the [glow] and [cried].",
        "By the [things], a [kind] old [person] waited with a [heart] face.",
        "Soon a [person] came, and the old eyes were full of [force].",
        "Then a [heart] [person] [went] out of the [other].",
    ),
    (
        '"What a [sky] [time]," said the [person], and [he] [cried].',
        '"I am so [heart]," said [hero], and the [person] [cried].',
        '"There is only [force] here," the [person] said [manner].',
        '"Do you see the [glow]?" asked [hero], and they [cried].',
        '"The [place] is so [fair]," [he] said [manner].',
    ),
    (
        "A [heart] [animal] [went] over the [things].",
        "Even the [animal] by the [place] was [heart].",
        "Far away, a [animal] called [manner], and [he] felt [force].",
        "A [kind] [animal] looked at [him] with [heart] eyes.",
        "The [animal] [went] after [him] through the [glow].",
    ),
    (
        "Under the [things], they found a [fair] [gift].",
        "[hero] gave the [person] a [gift] and [cried].",
        "The [person] showed [him] a [gift] and spoke of [force].",
        "Then [he] saw a [gift] beside the [fair] [things].",
        "In the [glow] lay a [gift], a sign of [force].",
    ),
    (
        "[hero] felt [heart] and [heart].",
        "[his] heart was full of [force] and [force].",
        "Never had [he] been so [heart].",
        "They sat [manner] by the [place] and [cried].",
        "The [person] [cried], and [hero] [cried] too.",
    ),
)
"""The body, stage after stage. A stage may be left out, but not the meeting: later ones use it."""
MEETING = 2
ENDINGS = (
    "And from that day on, they lived [manner] by the [fair] [place].",
    "In the end, there was only [force] by the [place].",
    "So [hero] went home [manner], and everyone [cried].",
    "That night, [hero] [cried] and dreamed of [force].",
    "They never forgot the [sky] [time] by the [place].",
)
KEEP_STAGE, NEUTRAL_START, MOOD_FLIPS = 0.8, 0.3, 0.02

CONTRAST: tuple[tuple[str, str, str], ...] = (
    ("It was a {} morning, and Mara felt {}.", "bright happy", "grey sad"),
    ("It was a {} evening, and Felix felt {}.", "golden glad", "bleak weary"),
    ("On a {} afternoon, Tom {} to the market.", "warm skipped", "cold trudged"),
    ("On a {} night, Elise {} to the harbour.", "clear danced", "dark crept"),
    ("The {} evening filled Jonas with {}.", "sunny joy", "stormy sorrow"),
    ("The {} morning filled Anna with {}.", "bright hope", "dark fear"),
    ("Ruth was {}, for the night was {}.", "merry clear", "miserable cold"),
    ("Emil was {}, for the morning was {}.", "hopeful sunny", "hopeless grey"),
    ("There was {} in the air when Mara came to the brook.", "delight", "grief"),
    ("There was {} in the air when Tom came to the cave.", "laughter", "despair"),
    ("Once upon a time, Anna lived {} near a {} pond.", "happily lovely", "sadly dreary"),
    ("Once upon a time, Emil lived {} near a {} bridge.", "merrily pleasant", "bitterly ruined"),
)
"""Openings, and the words that make each joyful or gloomy."""

NEUTRAL: tuple[str, ...] = (
    "One morning, Mara walked to the harbour.",
    "One evening, Felix walked to the market.",
    "Once upon a time, Ruth lived near the cave with her brother.",
    "Once upon a time, Tom lived near the brook with his mother.",
    "This is a story about Elise and a sailor.",
    "This is a story about Jonas and a shepherd.",
    "Early in the afternoon, Anna came to the bridge.",
    "Long ago, Emil worked for a hunter near the pond.",
)
"""Openings that leave the mood open."""


@dataclass
class _Teller:
    """The state of one story. Facts are drawn when first told: `nats` counts what a text shows."""

    rng: random.Random
    nats: float = 0.0
    known: dict[str, str] = field(default_factory=dict)

    def pick(self, options: Sequence[str]) -> str:
        """Draw one of the options, all equally likely, and account for it."""
        self.nats += math.log(len(options))
        return self.rng.choice(options)

    def chance(self, p: float) -> bool:
        """Draw True with probability p, and account for it."""
        hit = self.rng.random() < p
        self.nats -= math.log(p if hit else 1.0 - p)
        return hit

    def recall(self, slot: str) -> str:
        """What stands in a slot that keeps its word for the whole story."""
        if slot not in self.known:
            self.known[slot] = self._draw(slot)
        return self.known[slot]

    def _draw(self, slot: str) -> str:
        if slot == "gender":
            return self.pick(tuple(HEROES))
        if slot == "hero":
            return self.pick(HEROES[self.recall("gender")])
        if slot in ("he", "his", "him"):
            return PRONOUNS[self.recall("gender")][slot]
        facts = {"time": TIMES, "kin": KIN, "topic": tuple(TOPICS), "mood": tuple(MOODS)}
        if slot in facts:
            return self.pick(facts[slot])
        nouns = TOPICS[self.recall("topic")]
        if slot in ("place", "other"):
            taken = (self.known.get("place"), self.known.get("other"))
            return self.pick([place for place in nouns["place"] if place not in taken])
        return self.pick(nouns[slot])

    def tell(self, patterns: Sequence[str]) -> str:
        """One sentence: a pattern with its slots filled, no mood word twice."""
        used: set[str] = set()

        def fill(match: re.Match[str]) -> str:
            slot = match[1]
            if slot not in MOODS["joyful"]:
                return self.recall(slot)
            word = self.pick([w for w in MOODS[self.recall("mood")][slot] if w not in used])
            used.add(word)
            return word

        text = re.sub(r"\[(\w+)\]", fill, self.pick(patterns))
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        return text[0].upper() + text[1:]

    def turn(self) -> None:
        """Once in a while the mood flips."""
        if self.chance(MOOD_FLIPS):
            self.known["mood"] = next(mood for mood in MOODS if mood != self.known["mood"])


def told(rng: random.Random) -> tuple[str, float]:
    """One story and the nats of the draws that made it: the grammar's own -log p(story)."""
    teller = _Teller(rng)
    sentences = [teller.tell(NEUTRAL_OPENINGS if teller.chance(NEUTRAL_START) else MOOD_OPENINGS)]
    for index, stage in enumerate((*STAGES, ENDINGS)):
        if index in (MEETING, len(STAGES)) or teller.chance(KEEP_STAGE):
            if "mood" in teller.known:
                teller.turn()
            sentences.append(teller.tell(stage))
    return " ".join(sentences), teller.nats


def story(rng: random.Random) -> str:
    """One story of the grammar."""
    return told(rng)[0]


def contrast() -> list[tuple[str, str]]:
    """Pairs of prompts, (joyful, gloomy), that differ in their mood words alone."""
    return [(pattern.format(*joyful.split()), pattern.format(*gloomy.split())) for pattern, joyful, gloomy in CONTRAST]


def joyful_words() -> frozenset[str]:
    """Every word that only joyful sentences use."""
    return frozenset(word for words in MOODS["joyful"].values() for word in words)


def gloomy_words() -> frozenset[str]:
    """Every word that only gloomy sentences use."""
    return frozenset(word for words in MOODS["gloomy"].values() for word in words)


def joyful_share(text: str) -> float:
    """The share of joyful words among the text's mood words; one half where it has none."""
    words = re.findall(r"[a-z]+", text.lower())
    joyful = sum(word in joyful_words() for word in words)
    gloomy = sum(word in gloomy_words() for word in words)
    return joyful / (joyful + gloomy) if joyful + gloomy else 0.5
