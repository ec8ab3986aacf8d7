"""The words that synthetic text is made of: a small English lexicon, and open-ended invented strings."""

# ruff: noqa: SIM905 (split strings read better than lists of hundreds of literals)

from random import Random

NOUNS = (
    "apple river stone house garden window paper bottle bridge candle castle cloud coin desk door engine feather"
    " field fire fish flower forest fox goat guitar hammer hat horse island jacket kettle key kite ladder lake lamp"
    " leaf lemon letter lion map market mirror moon mountain mouse needle night ocean orange owl paint pear pencil"
    " piano pillow planet plate pocket pond potato queen rabbit radio rain ring road robot rocket roof rope rose"
    " sail salt sand school sea seed shadow sheep ship shoe silver sky snow soap song spoon star storm street sugar"
    " sun table tea tiger tower train tree truck tunnel turtle valley violin wagon wall watch water whale wheel"
    " wind wolf wood yard zebra bear bird boat book box bread brick bus cake camel cat chair cheese clock coat corn"
    " cow cup deer dog dragon duck eagle egg elephant farm farmer finger glove grape grass hill honey ice knight"
    " library machine milk monkey music nest onion painter panda parrot penguin pirate poem prince princess rice"
    " sailor snail soup spider squirrel student teacher tent tomato toy wizard worm"
).split()
ADJECTIVES = (
    "quick brown lazy small big old young happy sad bright dark quiet loud warm cold sweet bitter heavy light soft"
    " hard long short tall brave clever gentle hungry kind proud round sharp slow smooth strong tiny wild wise"
).split()
COLOURS = "red green blue yellow purple orange pink black white brown grey violet turquoise gold silver".split()
VERBS = "sees finds follows likes carries paints watches chases helps hears builds opens".split()
NAMES = (
    "Ada Alan Alice Amir Anna Ben Bob Carlos Chen Clara Dana David Elena Emma Eric Eva Fatima Felix Finn Grace Hana"
    " Hugo Ida Ines Ivan Jack James Jane Jin John Julia Karl Kate Kofi Lars Laura Leo Lena Lily Linus Lucy Luis Maria"
    " Mark Mary Max Maya Mei Mia Milo Mona Nadia Nina Noah Nora Olga Omar Oscar Paul Pia Priya Rosa Ruth Sam Sara Sofia"
    " Tara Theo Tim Tom Uma Vera Victor Wei Yara Yuki Zoe"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Oslo Vienna Prague Lisbon Dublin Athens Tokyo Kyoto Seoul Delhi Mumbai Cairo"
    " Nairobi Lagos Lima Quito Bogota Havana Boston Chicago"
    " Denver Seattle Austin Toronto Montreal Sydney Perth Auckland Geneva"
    " Zurich Milan Naples Porto Seville Warsaw Helsinki Stockholm Copenhagen Brussels Amsterdam Munich Hamburg Beijing"
    " Shanghai Singapore Bangkok Hanoi Jakarta Manila Istanbul Dubai Riyadh Tunis Accra Dakar"
).split()
FOODS = "pizza soup bread rice pasta salad cake pie curry sushi tacos pancakes noodles cookies".split()
ANIMALS = (
    "fox cat dog owl bear wolf lion tiger mouse rabbit whale turtle horse goat duck penguin dragon robot parrot panda"
    " snail spider monkey camel deer eagle sheep zebra squirrel elephant"
).split()

_ONSETS = (
    "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr kl pl pr qu sh sk sl sn sp st str th tr".split()
)
_VOWELS = "a e i o u ai ea ee ia io oo ou y".split()
_CODAS = ["", "", "", *"b d g k l m n p r s t x nd ng nt rk rn sh st th".split()]
_SCRIPTS = (
    (0xC0, 0xFF),
    (0x3B1, 0x3C9),
    (0x430, 0x44F),
    (0x4E00, 0x9FA5),
    (0x3042, 0x3093),
    (0xAC00, 0xD7A3),
)
_EMOJI = (0x1F600, 0x1F64F)


def invented_word(rng: Random, syllables: int | None = None) -> str:
    """A pronounceable word that is (nearly always) no word: keeps copying open-ended."""
    count = syllables or rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))


def word(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.45:
        return rng.choice(NOUNS)
    if roll < 0.6:
        return rng.choice(ADJECTIVES)
    if roll < 0.65:
        return rng.choice(COLOURS)
    return invented_word(rng)


def proper_noun(rng: Random, known: list[str], known_share: float = 0.5) -> str:
    """One of `known`, or an invented name."""
    return rng.choice(known) if rng.random() < known_share else invented_word(rng).capitalize()


def letters(rng: Random, length: int) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def digits(rng: Random, length: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(length))


def code(rng: Random) -> str:
    """An identifier such as `x7f-92k` or `QT_4410`."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        alphabet = rng.choice(
            ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "0123456789abcdef")
        )
        parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 4))))
    text = rng.choice("-_./:").join(parts)
    return text if text[0].isalpha() else rng.choice("abcxyzABCXYZ") + text  # never to be read as a number


def foreign(rng: Random) -> str:
    """A few characters outside ASCII, so that byte tokens are trained too."""
    if rng.random() < 0.3:
        return "".join(chr(rng.randint(*_EMOJI)) for _ in range(rng.randint(1, 3)))
    low, high = rng.choice(_SCRIPTS)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 5)))


def sentence(rng: Random) -> str:
    subject, thing = rng.choice(NOUNS + ANIMALS), word(rng)
    text = rng.choice(
        (
            f"the {rng.choice(ADJECTIVES)} {subject} {rng.choice(VERBS)} the {thing}",
            f"{rng.choice(NAMES)} {rng.choice(VERBS)} a {rng.choice(ADJECTIVES)} {thing}",
            f"my {subject} is {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}",
            f"we went to {rng.choice(CITIES)} with a {thing}",
            f"there are {rng.randint(2, 99)} {subject}s in the {thing}",
        )
    )
    return text[0].upper() + text[1:] + rng.choice(("", ".", "!", "?"))


def snippet(rng: Random) -> str:
    """A piece of text to copy: words, sentences, digits, codes, other scripts."""
    roll = rng.random()
    if roll < 0.3:
        return " ".join(word(rng) for _ in range(rng.choice((1, 1, 2, 3, 3, 4, 5, 6, 8, 12))))
    if roll < 0.5:
        return " ".join(sentence(rng) for _ in range(rng.choice((1, 1, 1, 2))))
    if roll < 0.58:
        return digits(rng, rng.randint(1, 10))
    if roll < 0.66:
        return " ".join(code(rng) for _ in range(rng.choice((1, 1, 2, 3))))
    if roll < 0.74:
        return " ".join(letters(rng, rng.randint(1, 7)) for _ in range(rng.randint(1, 4)))
    if roll < 0.8:
        return " ".join(str(rng.randint(0, 999)) for _ in range(rng.randint(2, 8)))
    if roll < 0.86:
        return " ".join(rng.choice((word(rng), foreign(rng))) for _ in range(rng.randint(1, 3)))
    if roll < 0.93:
        return rng.choice((", ", "; ", " - ", "/")).join(word(rng) for _ in range(rng.randint(2, 5)))
    text = " ".join(word(rng) for _ in range(rng.randint(1, 4)))
    return rng.choice((text.upper(), text.title()))
