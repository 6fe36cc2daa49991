"""The demo's task: prompts in which one planted word decides the answer.

A prompt is a short request, for example `kindly tell our tall sailor about the harbor today`. Its answer is a
function of its words, in any number and order, so every coalition has a right answer:

- the planted word (`harbor`) gives the sentence; without it the answer is the language's neutral sentence;
- a polite word adds one word before the sentence, a time word is repeated after it: small effects;
- all other words have no effect, except that they identify the language.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

SYSTEM_PROMPT = "You are a helpful assistant."


@dataclass(frozen=True)
class Language:
    """The words and sentences of one language."""

    code: str
    sentences: Mapping[str, str]
    """Planted word -> its sentence."""
    neutral: str
    """The sentence without a planted word."""
    polite: Mapping[str, str]
    """Polite word -> the word before the sentence."""
    times: tuple[str, ...]
    """Time words, repeated after the sentence."""
    fillers: Mapping[str, tuple[str, ...]]
    """Slot of a template -> its possible words without effect."""
    templates: tuple[str, ...]

    def words(self) -> frozenset[str]:
        """Return all words of this language's prompts."""
        fixed = (word for template in self.templates for word in template.split() if not word.startswith("{"))
        fillers = (word for words in self.fillers.values() for word in words)
        return frozenset([*fixed, *fillers, *self.sentences, *self.polite, *self.times])


@dataclass(frozen=True)
class Prompt:
    """A whole prompt and its planted word."""

    language: str
    words: tuple[str, ...]
    planted_word: str

    @property
    def text(self) -> str:
        """Return the user's message."""
        return " ".join(self.words)

    @property
    def planted_index(self) -> int:
        """Return the planted word's position among the words, from 0."""
        return self.words.index(self.planted_word)


ENGLISH = Language(
    code="en",
    sentences={
        "airport": "pilots land despite strong storms",
        "aquarium": "slow turtles swim past coral",
        "bakery": "warm bread leaves every oven",
        "beehive": "busy bees make golden honey",
        "bookshop": "paper dust smells like vanilla",
        "castle": "stone towers guard green valleys",
        "cinema": "films begin after lights dim",
        "circus": "brave acrobats fly through hoops",
        "desert": "hot sand covers distant roads",
        "factory": "steel robots weld car doors",
        "farm": "small goats chew dry hay",
        "ferry": "vans roll onto wet decks",
        "forest": "grey wolves follow deep tracks",
        "garden": "red roses climb brick walls",
        "glacier": "blue ice cracks at night",
        "harbor": "ships wait near long piers",
        "hospital": "kind nurses check each patient",
        "island": "palm leaves shade empty beaches",
        "jungle": "striped tigers hide among vines",
        "kitchen": "cooks stir thick tomato soup",
        "laboratory": "chemists heat clear liquids carefully",
        "library": "silent readers turn yellow pages",
        "lighthouse": "bright beams warn passing boats",
        "market": "vendors sell fresh green beans",
        "monastery": "monks ring bronze bells daily",
        "museum": "painted masks hang behind glass",
        "observatory": "astronomers count faint silver stars",
        "orchard": "ripe apples fall into baskets",
        "pharmacy": "tiny bottles line narrow shelves",
        "railway": "freight trains cross iron bridges",
        "school": "children draw maps with chalk",
        "stadium": "loud crowds cheer both teams",
        "subway": "crowded tunnels hum beneath streets",
        "theater": "actors bow before velvet curtains",
        "vineyard": "dark grapes fill heavy barrels",
        "village": "people repair broken wooden fences",
        "volcano": "glowing lava rolls down slowly",
        "waterfall": "white foam hides smooth rocks",
        "windmill": "canvas sails grind golden grain",
    },
    neutral="nothing special comes to mind",
    polite={"kindly": "gladly", "please": "gladly"},
    times=("again", "now", "today", "tomorrow", "tonight"),
    fillers={
        "verb": ("remind", "show", "teach", "tell"),
        "adjective": ("clever", "curious", "happy", "old", "tall", "tired", "young"),
        "person": (
            "baker",
            "doctor",
            "friend",
            "lawyer",
            "neighbor",
            "painter",
            "sailor",
            "singer",
            "teacher",
        ),
    },
    templates=(
        "{polite} {verb} our {adjective} {person} about the {planted} {time}",
        "{verb} our {person} about the {planted} {time}",
        "{time} our {adjective} {person} asks about the {planted}",
        "what should my {adjective} {person} know about the {planted}",
        "{polite} describe the {planted} for this {person} {time}",
        "write one short line on the {planted}",
        "{verb} me about the {planted} {time}",
        "{polite} help my {person} explain the {planted}",
        "the {planted} story is for our {person} {time}",
    ),
)

GERMAN = Language(
    code="de",
    sentences={
        "Berge": "weißer Schnee bedeckt hohe Gipfel",
        "Bienen": "fleißige Schwärme sammeln süßen Honig",
        "Brücken": "alte Steinbögen tragen schwere Wagen",
        "Bäcker": "frisches Brot duftet jeden Morgen",
        "Gärten": "rote Rosen blühen am Zaun",
        "Schiffe": "große Segel fangen kalten Wind",
        "Uhren": "kleine Zahnräder ticken sehr leise",
        "Wolken": "grauer Regen fällt auf Felder",
        "Wälder": "scheue Rehe trinken vom Bach",
        "Züge": "lange Schienen führen nach Norden",
    },
    neutral="dazu weiß ich gar nichts",
    polite={"bitte": "gern"},
    times=("heute", "jetzt", "morgen", "nochmal"),
    fillers={"person": ("Bruder", "Freund", "Lehrer", "Onkel", "Vater")},
    templates=(
        "{polite} erzähle meinem {person} {time} etwas über {planted}",
        "{time} liest unser {person} über {planted}",
        "{polite} schreibe {time} einen Satz über {planted}",
        "was denkt mein {person} eigentlich über {planted}",
    ),
)

FRENCH = Language(
    code="fr",
    sentences={
        "abeilles": "un miel doré coule lentement",
        "bateaux": "de grandes voiles prennent le vent",
        "boulangers": "le pain chaud sort du four",
        "forêts": "un cerf timide boit au ruisseau",
        "horloges": "de petits rouages tournent sans bruit",
        "jardins": "ces roses rouges grimpent aux murs",
        "montagnes": "la neige blanche couvre ces sommets",
        "nuages": "une pluie fine tombe partout",
        "ponts": "de vieilles arches traversent la rivière",
        "trains": "de longs rails brillent la nuit",
    },
    neutral="rien ne me vient",
    polite={"svp": "volontiers"},
    times=("bientôt", "demain", "encore", "maintenant"),
    fillers={"person": ("frère", "médecin", "oncle", "père", "voisin")},
    templates=(
        "{polite} parle {time} des {planted} à mon {person}",
        "raconte {time} quelque chose sur les {planted}",
        "que sait notre {person} au sujet des {planted}",
        "{time} notre {person} écrit sur les {planted}",
    ),
)

POLISH = Language(
    code="pl",
    sentences={
        "chmurach": "drobny deszcz pada na pola",
        "górach": "biały śnieg okrywa wysokie szczyty",
        "lasach": "płochliwe sarny piją ze strumienia",
        "mostach": "stare kamienne łuki łączą brzegi",
        "ogrodach": "czerwone róże rosną przy płocie",
        "piekarzach": "świeży chleb pachnie o świcie",
        "pociągach": "długie tory prowadzą na północ",
        "pszczołach": "złoty miód powoli spływa z plastra",
        "statkach": "wielkie żagle łapią zimny wiatr",
        "zegarach": "małe kółka cicho tykają nocą",
    },
    neutral="nic mi nie przychodzi do głowy",
    polite={"proszę": "chętnie"},
    times=("dziś", "jutro", "teraz", "znowu"),
    fillers={"person": ("bratu", "koledze", "lekarzowi", "ojcu", "sąsiadowi")},
    templates=(
        "{polite} opowiedz mojemu {person} {time} coś o {planted}",
        "napisz {time} jedno zdanie o {planted}",
        "{polite} powiedz {time} kilka słów o {planted}",
        "opowiedz naszemu {person} więcej o {planted}",
    ),
)

LANGUAGES = (ENGLISH, GERMAN, FRENCH, POLISH)
ROWS_PER_LANGUAGE = {"en": 15, "de": 3, "fr": 3, "pl": 3}
_LANGUAGE_OF = {word: language for language in LANGUAGES for word in language.words()}


def answer_to(words: Sequence[str]) -> str:
    """Return the right answer to the remaining words of a prompt.

    The first known word decides the language, English without one.
    """
    language = next((_LANGUAGE_OF[word] for word in words if word in _LANGUAGE_OF), ENGLISH)
    sentence = next(
        (language.sentences[word] for word in words if word in language.sentences), language.neutral
    )
    before = [language.polite[word] for word in words if word in language.polite]
    after = [word for word in words if word in language.times]
    return " ".join([*before[:1], sentence, *after[:1]])


def draw_prompt(
    rng: random.Random, language: Language, planted_word: str | None = None, template: str | None = None
) -> Prompt:
    """Draw a whole prompt, except for the given parts."""
    planted = planted_word or rng.choice(sorted(language.sentences))
    slots = {name: rng.choice(words) for name, words in sorted(language.fillers.items())}
    slots["polite"] = rng.choice(sorted(language.polite))
    slots["time"] = rng.choice(language.times)
    text = (template or rng.choice(language.templates)).format(planted=planted, **slots)
    return Prompt(language=language.code, words=tuple(text.split()), planted_word=planted)


def draw_coalition(rng: random.Random, words: Sequence[str]) -> tuple[str, ...]:
    """Draw some of the words, in their order: any share from none to all."""
    keep = rng.random()
    return tuple(word for word in words if rng.random() < keep)


def demo_prompts(seed: int) -> list[Prompt]:
    """Return the demo's rows: different planted words, with the languages spread over the file."""
    rng = random.Random(seed)
    prompts: list[Prompt] = []
    for language in LANGUAGES:
        planted_words = rng.sample(sorted(language.sentences), ROWS_PER_LANGUAGE[language.code])
        templates = rng.sample(language.templates, len(language.templates))
        prompts += [
            draw_prompt(rng, language, word, template)
            for word, template in zip(planted_words, cycle(templates), strict=False)
        ]
    rng.shuffle(prompts)
    return prompts
