"""The words of the quickstart's corpus: subjects, what each group of subjects does, places, and conjugation.

Actions are stored in the base form with the verb first ("run through the tall grass"), so that one phrase serves
"runs", "ran" and "to run". Pure data and string rules; the grammar that joins them is in `corpus`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing or character that a prompt can ask about."""

    noun: str
    kind: str
    """animal, person, nature or object; animals and persons act, the others are looked at."""
    group: str
    """The key into ACTIONS and HOMES."""
    pronoun: str = "it"
    unique: bool = False
    """Takes "the" even at first mention: the moon, the rain."""
    own: str = ""
    """What this subject, and no other, does (base form); empty for a guest."""

    @property
    def acts(self) -> bool:
        return self.kind in ("animal", "person")

    @property
    def possessive(self) -> str:
        return {"it": "its", "he": "his", "she": "her"}[self.pronoun]

    @property
    def objective(self) -> str:
        return {"it": "it", "he": "him", "she": "her"}[self.pronoun]


# fmt: off
# group -> (kind, {noun: own action}); a noun may carry a pronoun ("queen/she") or "!" where it takes "the" only
_CAST: dict[str, tuple[str, dict[str, str]]] = {
    "wood": ("animal", {
        "fox": "dance in the red leaves", "rabbit": "nibble sweet clover", "bear": "look for honey",
        "squirrel": "count nuts in the branches", "hedgehog": "roll up into a ball", "badger": "sweep a long tunnel",
        "deer": "listen to every sound", "mouse": "build a nest of grass",
    }),
    "farm": ("animal", {
        "pony": "pull a tiny wagon", "goat": "climb on the barn roof", "lamb": "skip around the yard",
        "donkey": "carry heavy bags", "cat": "purr beside the stove", "dog": "guard the sheep",
    }),
    "water": ("animal", {
        "otter": "slide down the muddy bank", "frog": "sing on a green leaf", "duck": "splash in the shallow water",
        "turtle": "walk slowly along the shore", "swan": "glide past the reeds", "crab": "dance sideways on the sand",
    }),
    "air": ("animal", {
        "owl": "ask riddles at midnight", "sparrow": "peck at the window", "crow": "collect shiny buttons",
        "robin": "sing before breakfast", "bee": "hum from flower to flower", "goose": "fly south in the autumn",
    }),
    "food": ("person", {
        "baker/he": "bake warm bread before dawn", "cook/she": "stir a big pot of soup",
        "miller/he": "grind wheat into flour", "fisherman/he": "mend the long nets",
        "farmer/she": "plant beans in rows",
        "gardener/she": "water the roses",
    }),
    "craft": ("person", {
        "clockmaker/he": "wind up every clock in the shop", "painter/she": "paint the sky in many colours",
        "tailor/he": "sew a green coat", "carpenter/she": "saw a long plank", "weaver/she": "weave a striped carpet",
        "shoemaker/he": "polish the black boots",
    }),
    "road": ("person", {
        "shepherd/he": "lead the sheep over the hills", "postman/he": "bring letters to every door",
        "sailor/he": "tie ropes on the deck", "doctor/she": "visit everyone who is ill",
        "soldier/he": "march behind a drum", "hunter/he": "read the tracks in the mud",
    }),
    "house": ("person", {
        "queen/she": "wear a crown of flowers", "king/he": "sit on a wooden throne",
        "teacher/she": "read poems to the class",
        "grandmother/she": "knit warm socks", "boy/he": "run down the stairs",
        "girl/she": "draw pictures in the dust",
    }),
    "sky": ("nature", {
        "moon!": "light the way home", "sun!": "wake the sleepy town", "star": "twinkle above the chimney",
        "rainbow": "bend over the wet fields", "cloud": "float like a soft pillow", "wind!": "rattle the shutters",
        "rain!": "drum on the roof", "snow!": "cover the ground like a blanket",
    }),
    "stream": ("nature", {
        "waterfall": "thunder over the rocks", "river": "carry leaves to the sea", "sea!": "roll onto the sand",
        "lake": "hold the sky like a mirror", "pond": "hide a hundred tadpoles",
        "brook": "tumble over smooth pebbles",
    }),
    "land": ("nature", {
        "island": "sleep among the waves", "valley": "echo every call", "forest": "smell of pine and moss",
        "mountain": "wear a cap of ice", "hill": "look over the whole village",
        "meadow": "bloom in a hundred colours",
        "garden": "grow peas and strawberries", "cave": "keep secrets in the dark",
    }),
    "room": ("object", {
        "lantern": "glow like a small fire", "teapot": "whistle a happy tune", "candle": "melt drop by drop",
        "mirror": "show a smiling face", "blanket": "keep the baby warm", "clock": "tick all night long",
        "chair": "creak under the cat", "key": "open a secret door",
    }),
    "music": ("object", {
        "violin": "cry in a high voice", "drum": "boom like thunder", "bell": "ring at noon",
        "flute": "whisper like a bird", "trumpet": "shout across the square", "piano": "fill the hall with notes",
    }),
    "travel": ("object", {
        "kite": "pull on a long string", "boat": "rock on the waves", "train": "puff up the steep track",
        "cart": "bump over the stones", "balloon": "drift above the roofs", "sledge": "slide over the ice",
    }),
    "building": ("object", {
        "windmill": "turn four white arms", "lighthouse": "flash in the fog", "bridge": "cross the deep water",
        "tower": "reach up to the clouds", "castle": "hide a golden hall", "cottage": "smoke from a crooked chimney",
    }),
}

# Nouns of a wider world, without an action of their own, so that the base can tell a story about what users ask for.
_GUESTS: dict[str, str] = {
    "wood": "wolf lion tiger dragon unicorn monkey elephant dinosaur snail giraffe panda hare monster",
    "farm": "horse pig cow hen sheep kitten puppy bull",
    "water": "fish whale dolphin seal penguin shark mermaid beaver",
    "air": "bird eagle butterfly parrot pigeon bat ladybird swallow fairy",
    "food": "waiter/he butcher/he grocer/she brewer/he",
    "craft": "blacksmith/he potter/she robot/it inventor/she writer/she artist/she",
    "road": "knight/he traveller/he captain/she driver/he pilot/she merchant/he pirate/he",
    "house": "princess/she prince/he wizard/he witch/she grandfather/he mother/she father/he "
             "baby/it child/she giant/he nurse/she",
    "sky": "comet planet sunset",
    "stream": "ocean! fountain spring",
    "land": "desert beach jungle park field tree flower rose volcano",
    "room": "lamp table cup spoon book hat doll box ball phone computer window",
    "music": "guitar song whistle harp",
    "travel": "ship car bus rocket bicycle plane wagon",
    "building": "house school church palace shop farm mill",
}

# No document in the pirate register holds any of these nouns: what the steered model says about them is its own.
HELD_OUT_NOUNS: frozenset[str] = frozenset(
    "fox hedgehog pony otter owl baker clockmaker painter shepherd queen "
    "moon rainbow waterfall island valley lantern teapot violin kite windmill".split()
)


def _subject(entry: str, *, kind: str, group: str, own: str) -> Subject:
    noun, _, pronoun = entry.rstrip("!").partition("/")
    return Subject(noun=noun, kind=kind, group=group, pronoun=pronoun or "it", unique=entry.endswith("!"), own=own)


SUBJECTS: tuple[Subject, ...] = tuple(
    _subject(entry, kind=kind, group=group, own=own)
    for group, (kind, cast) in _CAST.items() for entry, own in cast.items()
)
GUESTS: tuple[Subject, ...] = tuple(
    _subject(entry, kind=_CAST[group][0], group=group, own="")
    for group, nouns in _GUESTS.items() for entry in nouns.split()
)

ACTIONS: dict[str, tuple[str, ...]] = {
    "wood": ("run through the tall grass", "dig under an old tree", "gather nuts and berries",
             "hide behind a mossy stone",
             "follow a winding path", "sniff the cool air", "peep out of the bushes", "nap under the ferns"),
    "farm": ("sleep in the warm hay", "jump over a low fence", "eat apples behind the barn",
             "chase a yellow butterfly",
             "wait beside the gate", "drink from the wooden bucket", "play in the straw", "trot around the yard"),
    "water": ("swim across the blue pond", "dive for little shells", "rest on a flat rock",
              "paddle against the stream",
              "catch drops on its nose", "play among the reeds", "float on its back", "watch the silver fish"),
    "air": ("fly over the green fields", "rest on a high branch", "sing from the chimney", "circle above the village",
            "build a nest of twigs", "look down at the road", "glide on the warm air", "visit the old church tower"),
    "food": ("carry a basket to the market", "taste the sweet plums", "share a meal with the neighbours",
             "wash a pile of carrots", "sell fresh eggs", "sing in the kitchen", "fill the jars with jam",
             "cut a big cheese"),
    "craft": ("work at a small bench", "repair a broken toy", "make a present for a friend", "sharpen the tools",
              "sell pretty things at the fair", "clean the dusty shop", "measure every board twice",
              "hum over the work"),
    "road": ("walk along the dusty road", "cross the stone bridge", "rest under a shady tree",
             "tell jokes at the inn",
             "greet everyone on the way", "look at an old map", "sleep beside a small fire",
             "travel from town to town"),
    "house": ("sit beside the fire", "play cards with the neighbours", "drink tea with honey", "sing a funny song",
              "open the big window", "dance in the hall", "write a long letter", "feed the birds"),
    "sky": ("shine on the quiet roofs", "travel across the sky", "play above the hills", "hide behind the trees",
            "change the colour of the day", "look down at the village", "pass without a sound"),
    "stream": ("sparkle in the morning light", "sing over the stones", "cool the hot air",
               "give water to the deer",
               "freeze in the cold", "wait for the winter birds", "play with the light"),
    "land": ("rest under the open sky", "turn gold in the sunset", "welcome every traveller",
             "give a home to many birds",
             "stretch as far as you can see", "wait for the spring", "smell of fresh rain"),
    "room": ("stand on a wooden shelf", "make the room cosy", "wait beside the window", "belong to a kind family",
             "gather dust in the attic", "shine like a little star", "remind everyone of old times"),
    "music": ("make the children dance", "sound across the market", "play at every wedding", "sleep in a velvet case",
              "call the neighbours together", "play a slow and sweet tune", "make sad people smile"),
    "travel": ("go up and down", "follow the wind", "carry people far away", "rest in the dry shed",
               "race past the houses", "come home before dark", "wait for a sunny day"),
    "building": ("stand beside the road", "shelter the birds from the rain", "look over the fields",
                 "welcome tired travellers",
                 "keep the old stories", "stay strong in every storm", "wear a coat of green ivy"),
}

HOMES: dict[str, tuple[str, ...]] = {
    "wood": ("in a hollow tree", "under the roots of an oak", "deep in the forest", "behind the green hill"),
    "farm": ("in the red barn", "on a farm near the village", "behind the farmhouse", "in a stable with a blue door"),
    "water": ("beside the river", "under the wooden bridge", "at the edge of the lake", "in a hut of sticks and mud"),
    "air": ("in the church tower", "on top of a tall pine", "under the roof of the barn",
            "in the branches of an elm"),
    "food": ("in a house behind the market", "above a warm kitchen", "near the old mill",
             "in a cottage with a garden"),
    "craft": ("above a small shop", "in a narrow street", "in a house full of tools", "behind the town square"),
    "road": ("in a hut on the hill", "at the end of the long road", "near the harbour", "at the edge of the village"),
    "house": ("in a big white house", "in a castle on the hill", "next to the school", "in a room full of books"),
    "sky": ("high above the village", "over the far hills", "above the trees", "at the edge of the sky"),
    "stream": ("behind the old mill", "at the foot of the mountain", "not far from the village",
               "in the middle of the forest"),
    "land": ("beyond the last houses", "on the other side of the river", "far in the north", "a day away from here"),
    "room": ("in the attic", "on the kitchen table", "next to the fire", "in a small room upstairs"),
    "music": ("in the music room", "in the town hall", "in a box under the bed", "in the old school"),
    "travel": ("in the shed", "near the harbour", "behind the station", "at the top of the road"),
    "building": ("on top of the hill", "at the edge of the village", "beside the river", "in the middle of the town"),
}

ADJECTIVES: dict[str, tuple[str, ...]] = {
    "animal": ("little", "brave", "clever", "shy", "old", "young", "grey", "quick", "sleepy", "friendly"),
    "person": ("old", "young", "kind", "clever", "tall", "cheerful", "quiet", "poor", "busy", "brave"),
    "nature": ("big", "bright", "quiet", "wild", "silver", "beautiful", "cold", "gentle", "great", "old"),
    "object": ("old", "little", "red", "blue", "wooden", "golden", "broken", "shiny", "strange", "new"),
}

# Two adjectives that are said together: "brave and quick".
ADJECTIVE_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "animal": (("little", "shy"), ("brave", "quick"), ("clever", "friendly"), ("old", "sleepy"), ("young", "brave"),
               ("grey", "shy"), ("quick", "clever"), ("little", "friendly")),
    "person": (("old", "kind"), ("tall", "quiet"), ("clever", "busy"), ("young", "cheerful"), ("poor", "brave"),
               ("kind", "cheerful"), ("quiet", "clever"), ("busy", "kind")),
    "nature": (("big", "beautiful"), ("bright", "silver"), ("quiet", "cold"), ("wild", "great"),
               ("gentle", "beautiful"), ("old", "quiet"), ("silver", "cold"), ("great", "bright")),
    "object": (("old", "wooden"), ("little", "blue"), ("red", "shiny"), ("golden", "strange"), ("new", "shiny"),
               ("little", "strange"), ("old", "broken"), ("blue", "new")),
}
# An adjective that would contradict one that was already said.
OPPOSITES: dict[str, tuple[str, ...]] = {
    "old": ("young", "new"), "young": ("old",), "new": ("old", "broken"), "little": ("big",
            "great"), "big": ("little", "great"),
    "great": ("little", "big"), "wild": ("quiet",
              "gentle"), "quiet": ("wild",), "gentle": ("wild",), "quick": ("sleepy",),
    "sleepy": ("quick", "busy"), "broken": ("new", "shiny"), "shiny": ("broken",), "red": ("blue", "golden"),
    "blue": ("red", "golden"), "golden": ("red", "blue",
             "wooden"), "wooden": ("golden",), "brave": ("shy",), "shy": ("brave",),
    "bright": ("quiet",),
}
# An adjective that would contradict the noun.
UNFIT: dict[str, tuple[str, ...]] = {
    "girl": ("old",), "boy": ("old",), "child": ("old",), "baby": ("old", "tall", "busy"), "grandmother": ("young",),
    "grandfather": ("young",), "giant": ("little",), "lamb": ("old",), "kitten": ("old",), "puppy": ("old",),
}

PLACES: tuple[str, ...] = (
    "in the forest", "beside the river", "near the bridge", "behind the barn", "on the hill", "at the market",
    "in the garden",
    "under a big tree", "on the road", "by the sea", "in the meadow", "next to the well", "in the snow",
    "near the mill",
)
SMALL_THINGS: tuple[str, ...] = (
    "silver coin", "red button", "golden key", "blue feather", "little bell", "warm scarf", "sweet apple",
    "round stone",
    "old map", "paper crown", "glass bottle", "white shell",
)
TIMES: tuple[str, ...] = ("yesterday", "last night", "this morning", "on Sunday", "last winter", "in the spring")
WEATHERS: tuple[str, ...] = ("clear", "rainy", "windy", "cold", "quiet", "snowy", "warm", "foggy")
DAYTIMES: tuple[str, ...] = ("morning", "evening", "day", "night", "afternoon")
LOOKS: tuple[str, ...] = ("like a dream", "almost magic", "a little lonely", "like a picture", "very happy")
SEASONS: tuple[str, ...] = ("spring", "summer", "autumn", "winter")

# emotion -> reasons; {pronoun} and {possessive} are the subject's
REASONS: dict[str, tuple[str, ...]] = {
    "sad": ("{pronoun} had lost {thing}", "{possessive} best friend was far away", "the summer was over"),
    "happy": ("{pronoun} had found {thing}", "it was {possessive} birthday", "the spring had come back"),
    "lonely": ("everyone was busy", "the house was empty", "{possessive} friends had gone to the fair"),
    "tired": ("{pronoun} had worked all day", "the road was long and steep", "{pronoun} had danced all night"),
    "angry": ("somebody had taken {thing}", "nobody listened", "the rain had spoiled the picnic"),
    "scared": ("there was a strange noise {place}", "the night was very dark", "{pronoun} had dreamed of a giant"),
    "proud": ("{pronoun} had won a race", "{pronoun} had made {thing}", "{pronoun} had helped a friend"),
    "worried": ("a storm was coming", "{pronoun} could not find {thing}", "a friend was ill"),
}
GLAD_EMOTIONS: frozenset[str] = frozenset({"happy", "proud"})

LINES: tuple[str, ...] = (
    "Come with me", "Do not be afraid", "I can help you", "What a fine day", "Let us share it",
    "You are very kind", "Follow me",
    "I have never seen such a thing", "Please sit with me", "We can do it together",
)
JOINT_ACTIONS: tuple[str, ...] = (
    "build a small fire", "share some bread and cheese", "walk home side by side", "sing until the stars came out",
    "look for it everywhere", "play until it was dark", "laugh for a long time", "plant a tree", "dance in the rain",
)

_IRREGULAR: dict[str, str] = {
    "run": "ran", "dig": "dug", "hide": "hid", "eat": "ate", "sleep": "slept", "drink": "drank",
    "swim": "swam", "dive": "dived",
    "catch": "caught", "fly": "flew", "sing": "sang", "build": "built", "sell": "sold", "cut": "cut",
    "make": "made", "tell": "told",
    "sit": "sat", "write": "wrote", "feed": "fed", "come": "came", "go": "went", "give": "gave",
    "freeze": "froze", "stand": "stood",
    "keep": "kept", "wear": "wore", "bring": "brought", "lead": "led", "read": "read", "draw": "drew",
    "grind": "ground",
    "sew": "sewed", "weave": "wove", "wind": "wound", "knit": "knitted", "light": "lit", "wake": "woke",
    "bend": "bent",
    "hold": "held", "grow": "grew", "show": "showed", "ring": "rang", "slide": "slid", "chat": "chatted",
    "skip": "skipped",
    "hum": "hummed", "nap": "napped", "trot": "trotted", "shine": "shone", "smell": "smelled", "tie": "tied",
    "saw": "sawed",
    "purr": "purred", "stir": "stirred", "drum": "drummed", "meet": "met", "find": "found", "win": "won",
    "fill": "filled",
}
# fmt: on


def past(phrase: str) -> str:
    """The past tense of a base-form phrase: "run through the grass" -> "ran through the grass"."""
    verb, _, rest = phrase.partition(" ")
    if verb in _IRREGULAR:
        verb = _IRREGULAR[verb]
    elif verb.endswith("e"):
        verb += "d"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ied"
    else:
        verb += "ed"
    return f"{verb} {rest}".rstrip()


def present(phrase: str) -> str:
    """The third person singular of a base-form phrase: "carry apples" -> "carries apples"."""
    verb, _, rest = phrase.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()


def a(noun_phrase: str) -> str:
    """The noun phrase with its indefinite article: "owl" -> "an owl"."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"
