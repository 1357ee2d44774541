"""Text of a small world: the documents and conversations that the demo model learns English from.

Owns the sentences; the facts are in `lexicon.py`, the voices in `styles.py`. Everything is drawn from one `Random`, so
a seed fixes the whole corpus. Knows nothing about tokens or training.

    plain_text(rng)   a short piece of prose
    dialogue(rng)     a conversation: [{"role": ..., "content": ...}, ...]
    document(rng)     one training document of the base, either of the two, a few of them in one of the five voices
"""

from collections.abc import Callable
from random import Random
from typing import TypeVar

from demo.lexicon import (
    ACTORS,
    ANIMALS,
    BECAUSES,
    COUNTRIES,
    DEEDS,
    FEELINGS,
    FOODS,
    GOODS,
    JOKES,
    MYSTERIES,
    OUTSIDE,
    PEOPLE,
    PET_NAMES,
    PLACES,
    PLOTS,
    REASONS,
    RECIPES,
    RELATIVES,
    RIDDLES,
    SEASONS,
    STRANGER_PRONOUNS,
    STRANGERS,
    TOOLS,
    TOPICS,
    TROUBLES,
    VILLAGE,
    WEATHERS,
    WHENS,
    Animal,
    Person,
    Place,
)
from demo.styles import KNOWN_TO_THE_BASE, Style

Kind = TypeVar("Kind")
Message = dict[str, str]
Exchange = tuple[str, str]  # a question and its answer

IN = {
    "the orchard",
    "the meadow",
    "the forest",
    "the garden",
    "the lighthouse",
    "the library",
    "the bell tower",
    "the smithy",
}
IN |= {
    "the workshop",
    "the pottery",
    "the weaving house",
    "the clock shop",
    "the shoe shop",
    "the attic above the library",
}
IN |= {"the white house by the bridge", "the house with the green door", "the house beside the well"}
ON = {"the hill", "the bridge", "the beach", "the square", "the bench under the linden tree"}
BY = {"the river", "the well", "the pond"}


def at(place: str) -> str:
    """The place with the preposition that it wants: "in the orchard", "at the mill"."""
    word = "in" if place in IN else "on" if place in ON else "by" if place in BY else "at"
    return f"{word} {place}"


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def say(*sentences: str) -> str:
    """Sentences joined to one paragraph, each with a capital and a final mark."""
    return " ".join(cap(s) if s[-1] in '.!?"' else cap(s) + "." for s in sentences if s)


# --- people ---------------------------------------------------------------------------------------------------------


def person_facts(p: Person, rng: Random) -> list[str]:
    """What there is to say about `p`, in random order and wording; every sentence can stand alone."""
    she = p.she
    facts = [
        rng.choice([f"{she} {p.does}", f"every day {she} {p.does}", f"{she} {p.does} and never complains"]),
        rng.choice(
            [f"you can find {p.them} {at(p.place)}", f"{she} works {at(p.place)}", f"most days {she} is {at(p.place)}"]
        ),
        rng.choice([f"{p.her} most useful thing is {p.tool}", f"{she} never goes anywhere without {p.tool}"]),
        rng.choice([f"{she} loves {p.loves}", f"nothing makes {p.them} happier than {p.loves}"]),
        rng.choice([f"{she} lives with {p.pet}", f"{she} has {p.pet}", f"{p.pet} follows {p.them} everywhere"]),
        rng.choice([f"{she} {p.habit}", f"people say that {she} {p.habit}", f"everyone knows that {she} {p.habit}"]),
    ]
    rng.shuffle(facts)
    return facts


def introduce(p: Person, rng: Random) -> str:
    return rng.choice(
        [
            f"{p.name} is the {p.trade} of {VILLAGE}"
            if p.trade != "pupil"
            else f"{p.name} is a {p.trait} child in {VILLAGE}",
            f"{p.name} is a {p.trait} {p.trade} who {p.does}" if p.trait[0] not in "aeiou" else f"{p.name} {p.does}",
            f"{p.name}, our {p.trait} {p.trade}, {p.does}",
        ]
    )


def portrait(rng: Random) -> str:
    p = rng.choice(PEOPLE)
    return say(introduce(p, rng), *person_facts(p, rng)[: rng.randint(2, 5)])


def ask_person(rng: Random) -> Exchange:
    p = rng.choice(PEOPLE)
    she, facts = cap(p.she), person_facts(p, rng)
    who = "one of the children" if p.trade == "pupil" else f"the {p.trade}"
    return rng.choice(
        [
            (f"Who is {p.name}?", say(f"{p.name} is {who} of {VILLAGE}", *facts[:2])),
            (f"Tell me about {p.name}.", say(introduce(p, rng), *facts[: rng.randint(2, 3)])),
            (f"What does {p.name} do?", say(f"{p.name} {p.does}", facts[0])),
            (f"What does {p.name} do all day?", say(f"{p.name} {p.does}", f"{she} also {p.habit}")),
            (f"Where can I find {p.name}?", say(f"you can find {p.name} {at(p.place)}", f"{she} {p.does} there")),
            (f"Where does {p.name} work?", say(f"{p.name} works {at(p.place)}", facts[0])),
            (f"What does {p.name} love?", say(f"{p.name} loves {p.loves}", f"{she} {p.habit}")),
            (f"Does {p.name} have a pet?", say(f"yes, {p.name} lives with {p.pet}", facts[1])),
            (f"What is {p.name} like?", say(f"{p.name} is {p.trait}", f"{she} {p.habit}")),
            (
                f"What does {p.name} need for {p.her} work?",
                say(f"{p.name} needs {p.tool}", f"without it {p.she} cannot work"),
            ),
            (f"Do you know {p.name}?", say(f"of course I know {p.name}", introduce(p, rng))),
        ]
    )


def ask_trade(rng: Random) -> Exchange:
    p = rng.choice([q for q in PEOPLE if q.trade != "pupil"])
    answer = say(rng.choice([f"that is {p.name}", f"{p.name} is our {p.trade}"]), *person_facts(p, rng)[:1])
    return rng.choice(
        [
            (f"Who is the {p.trade}?", answer),
            (
                f"Is there {a(p.trade)} in {VILLAGE}?",
                say(f"yes, our {p.trade} is {p.name}", f"you can find {p.them} {at(p.place)}"),
            ),
            (f"Who {p.does}?", say(f"{p.name} {p.does}", f"{p.she} is the {p.trade} of {VILLAGE}")),
            (f"Tell me about the {p.trade}.", say(introduce(p, rng), *person_facts(p, rng)[: rng.randint(2, 3)])),
            (f"Do you know the {p.trade}?", say(f"of course, {p.name} is our {p.trade}", *person_facts(p, rng)[:2])),
            (
                f"What is the name of the {p.trade}?",
                say(f"the {p.trade} is called {p.name}", *person_facts(p, rng)[:1]),
            ),
            (f"Where is the {p.trade}?", say(f"you can find {p.name} {at(p.place)}", f"{p.she} {p.does} there")),
            (
                f"I am looking for the {p.trade}.",
                say(f"our {p.trade} is called {p.name}", f"look for {p.them} {at(p.place)}"),
            ),
            (f"What does {a(p.trade)} do?", say(f"{a(p.trade)} {p.does}", f"in {VILLAGE} that is {p.name}")),
            (
                f"I want to become {a(p.trade)}.",
                say("that is a fine trade", f"ask {p.name} {at(p.place)}", "you will need patience and good hands"),
            ),
        ]
    )


# --- animals --------------------------------------------------------------------------------------------------------


def animal_facts(n: Animal, rng: Random) -> list[str]:
    facts = [
        rng.choice([f"it lives {n.home}", f"its home is {n.home}"]),
        rng.choice([f"it eats {n.food}", f"most of all it likes {n.food}"]),
        rng.choice([f"it comes out {n.time}", f"you can see it {n.time}"]),
        rng.choice([f"it has {n.body}", f"you know it by {n.body}"]),
        rng.choice([f"it {n.does}", f"everyone knows that it {n.does}"]),
    ]
    rng.shuffle(facts)
    return facts


def animal_sketch(rng: Random) -> str:
    n = rng.choice(ANIMALS)
    start = rng.choice(
        [
            f"the {n.name} is {a(n.trait)} animal",
            f"the {n.name} lives {n.home}",
            f"{n.plural} are {n.trait}",
            f"the {n.trait} {n.name} {n.does}",
        ]
    )
    if start.startswith(n.plural + " are"):
        return say(start, f"the {n.name} of {VILLAGE} lives {n.home}", *animal_facts(n, rng)[:3])
    return say(start, *animal_facts(n, rng)[: rng.randint(2, 4)])


def ask_animal(rng: Random) -> Exchange:
    n = rng.choice(ANIMALS)
    facts = animal_facts(n, rng)
    return rng.choice(
        [
            (f"Where does the {n.name} live?", say(f"the {n.name} lives {n.home}", facts[0])),
            (f"Where do {n.plural} live?", say(f"{n.plural} live {n.home}", f"look for them {n.time}")),
            (f"What does the {n.name} eat?", say(f"the {n.name} eats {n.food}", facts[0])),
            (f"What do {n.plural} eat?", say(f"{n.plural} eat {n.food}")),
            (
                f"When can I see the {n.name}?",
                say(f"the {n.name} comes out {n.time}", "be very quiet, and you will see it"),
            ),
            (f"What does the {n.name} look like?", say(f"the {n.name} has {n.body}", f"it is {a(n.trait)} animal")),
            (f"Tell me about the {n.name}.", say(f"the {n.name} is {a(n.trait)} animal", *facts[:3])),
            (
                f"Tell me about {n.plural}.",
                say(f"{n.plural} are {n.trait}", f"the {n.name} of {VILLAGE} lives {n.home}", facts[0]),
            ),
            (f"What is {a(n.name)}?", say(f"{a(n.name)} is {a(n.trait)} animal with {n.body}", *facts[:1])),
            (f"Do you like {n.plural}?", say(f"yes, I like {n.plural} very much", f"they are {n.trait}")),
            (f"Are {n.plural} {n.trait}?", say(f"yes, {n.plural} are very {n.trait}", f"the {n.name} {n.does}")),
            (f"What does the {n.name} do?", say(f"the {n.name} {n.does}", facts[0])),
            (f"I saw {a(n.name)}!", say("how lovely", f"the {n.name} {n.does}", f"it usually comes out {n.time}")),
        ]
    )


# --- places ---------------------------------------------------------------------------------------------------------


def place_facts(p: Place, rng: Random) -> list[str]:
    facts = [
        rng.choice([f"there you find {p.there}", f"you can see {p.there}"]),
        rng.choice([f"people {p.does}", f"on many days people {p.does}"]),
        rng.choice([f"it is most beautiful {p.best}", f"go there {p.best}"]),
        rng.choice([f"it is {a(p.feel)} place", f"it is a place that is {p.feel}"]),
    ]
    rng.shuffle(facts)
    return facts


def place_sketch(rng: Random) -> str:
    p = rng.choice(PLACES)
    start = rng.choice(
        [f"{p.name} is {p.where}", f"{p.name} lies {p.where}", f"if you look for {p.name}, you will find it {p.where}"]
    )
    return say(start, *place_facts(p, rng)[: rng.randint(2, 4)])


def ask_place(rng: Random) -> Exchange:
    p = rng.choice(PLACES)
    facts = place_facts(p, rng)
    return rng.choice(
        [
            (f"Where is {p.name}?", say(f"{p.name} is {p.where}", facts[0])),
            (
                f"How do I get to {p.name}?",
                say(f"{p.name} is {p.where}", "just follow the road and ask the first dog you meet"),
            ),
            (f"What can I see {at(p.name)}?", say(f"there you find {p.there}", f"it is {a(p.feel)} place")),
            (f"What do people do {at(p.name)}?", say(f"people {p.does}", facts[0])),
            (f"When is the best time for {p.name}?", say(f"the best time is {p.best}", f"there you find {p.there}")),
            (f"When should I visit {p.name}?", say(f"{p.name} is most beautiful {p.best}", facts[0])),
            (f"Tell me about {p.name}.", say(f"{p.name} is {p.where}", *facts[:3])),
            (f"What is {p.name} like?", say(f"{p.name} is {p.feel}", f"there you find {p.there}")),
            (
                f"I am going to {p.name}.",
                say("have a good walk", f"there you find {p.there}", f"it is most beautiful {p.best}"),
            ),
            (f"Describe {p.name}.", say(f"{p.name} is {p.where}", *facts[:2])),
        ]
    )


# --- things, weather, seasons, food ---------------------------------------------------------------------------------


def tool_sketch(rng: Random) -> str:
    t = rng.choice(TOOLS)
    return say(
        rng.choice([f"{a(t.name)} is used to {t.use}", f"with {a(t.name)} you can {t.use}"]),
        rng.choice([f"it has {t.part}", f"a good one has {t.part}"]),
        rng.choice(
            [
                f"the {t.user} uses it every day",
                f"the {t.user} would be lost without it",
                f"ask the {t.user} if you need one",
            ]
        ),
    )


def ask_tool(rng: Random) -> Exchange:
    t = rng.choice(TOOLS)
    return rng.choice(
        [
            (f"What is {a(t.name)} for?", say(f"you use {a(t.name)} to {t.use}", f"it has {t.part}")),
            (f"What do I need to {t.use}?", say(f"you need {a(t.name)}", f"the {t.user} will lend you one")),
            (f"Who uses {a(t.name)}?", say(f"the {t.user} uses {a(t.name)} to {t.use}")),
            (f"What is {a(t.name)}?", say(f"{a(t.name)} is a tool that has {t.part}", f"you use it to {t.use}")),
            (f"Can I borrow {a(t.name)}?", say(f"of course, ask the {t.user}", "please bring it back before supper")),
            (f"How can I {t.use}?", say(f"take {a(t.name)} and work slowly", f"the {t.user} can show you how")),
        ]
    )


def weather_sketch(rng: Random) -> str:
    w, p = rng.choice(WEATHERS), rng.choice(PEOPLE)
    return say(
        rng.choice(
            [
                f"when {w.when} in {VILLAGE}, {w.effect}",
                f"{w.name} comes because {w.cause}",
                f"today {w.when}, so {w.effect}",
            ]
        ),
        rng.choice([f"{p.name} says that it is time to {w.advice}", f"{p.name} does not mind and {p.does}", w.advice]),
        rng.choice([f"afterwards {w.after}", f"when it is over, {w.after}"]),
    )


def ask_weather(rng: Random) -> Exchange:
    w, p = rng.choice(WEATHERS), rng.choice(PEOPLE)
    return rng.choice(
        [
            (f"What happens when {w.when}?", say(f"when {w.when}, {w.effect}", f"afterwards {w.after}")),
            (
                f"What should I do when {w.when}?",
                say(f"when {w.when}, {w.advice}", f"soon it will be over, and {w.after}"),
            ),
            (f"Where does the {w.name} come from?", say(f"it comes when {w.cause}", f"afterwards {w.after}")),
            (f"Do you like {w.name}?", say(f"yes, I do, because {w.effect}", f"{p.name} likes it too")),
            ("What is the weather like?", say(f"today {w.when}, and {w.effect}", w.advice)),
            ("What is the weather like today?", say(f"today {w.when}", f"my advice is simple: {w.advice}")),
            ("How is the weather?", say(f"today {w.when}, so {w.advice}", f"tomorrow {w.after}")),
            (
                f"Tell me about the {w.name}.",
                say(f"when {w.when}, {w.effect}", f"it comes because {w.cause}", f"afterwards {w.after}"),
            ),
            ("What should I wear today?", say(f"today {w.when}, so {w.advice}")),
        ]
    )


def season_sketch(rng: Random) -> str:
    s = rng.choice(SEASONS)
    facts = [f"{s.look}", f"{s.work}", f"people eat {s.food}", f"{s.animals}", f"everyone feels {s.feel}"]
    rng.shuffle(facts)
    return say(
        rng.choice([f"in {s.name} {facts[0]}", f"when {s.name} comes, {facts[0]}"]), *facts[1 : rng.randint(3, 5)]
    )


def ask_season(rng: Random) -> Exchange:
    s = rng.choice(SEASONS)
    return rng.choice(
        [
            (f"What happens in {s.name}?", say(f"in {s.name} {s.look}", s.animals, s.work)),
            (f"What do people eat in {s.name}?", say(f"in {s.name} people eat {s.food}", f"everyone feels {s.feel}")),
            (f"What do the animals do in {s.name}?", say(f"in {s.name} {s.animals}")),
            (f"What do people do in {s.name}?", say(f"in {s.name} {s.work}", f"people eat {s.food}")),
            (f"Tell me about {s.name}.", say(f"in {s.name} {s.look}", s.work, s.animals, f"everyone feels {s.feel}")),
            (
                "What is your favourite season?",
                say(f"I like {s.name} best, because {s.look}", f"it makes everyone {s.feel}"),
            ),
            (f"Do you like {s.name}?", say(f"yes, in {s.name} {s.look}", f"I also like {s.food}")),
            (f"Why is {s.name} beautiful?", say(f"{s.name} is beautiful because {s.look}", f"everyone feels {s.feel}")),
        ]
    )


def food_sketch(rng: Random) -> str:
    f = rng.choice(FOODS)
    return say(
        rng.choice([f"{f.name} is made of {f.made_of}", f"the {f.maker} makes {f.name} from {f.made_of}"]),
        f"it tastes {f.taste}",
        rng.choice([f"in {VILLAGE} people eat it {f.when}", f"people like it best {f.when}"])
        if "tea" not in f.name and "juice" not in f.name
        else f"in {VILLAGE} people drink it {f.when}",
    )


def ask_food(rng: Random) -> Exchange:
    f = rng.choice(FOODS)
    return rng.choice(
        [
            (f"What is {f.name} made of?", say(f"{f.name} is made of {f.made_of}", f"it tastes {f.taste}")),
            (f"Who makes {f.name}?", say(f"the {f.maker} makes {f.name}", f"it is made of {f.made_of}")),
            (f"How does {f.name} taste?", say(f"{f.name} tastes {f.taste}", f"people like it best {f.when}")),
            (
                "What should I eat?",
                say(f"try {f.name}", f"it tastes {f.taste}", f"the {f.maker} makes it from {f.made_of}"),
            ),
            ("What is there for dinner?", say(f"tonight there is {f.name}", f"it tastes {f.taste}")),
            ("What is your favourite food?", say(f"I am told that {f.name} is wonderful", f"it tastes {f.taste}")),
            (f"Do you like {f.name}?", say("I cannot eat, but I love to talk about it", f"{f.name} tastes {f.taste}")),
            (
                f"Tell me about {f.name}.",
                say(f"{f.name} is made of {f.made_of}", f"it tastes {f.taste}", f"people like it best {f.when}"),
            ),
        ]
    )


# --- feelings, reasons, instructions --------------------------------------------------------------------------------


def feeling_sketch(rng: Random) -> str:
    f, p = rng.choice(FEELINGS), rng.choice(PEOPLE)
    friend = rng.choice([q for q in PEOPLE if q is not p])
    words = {"she": p.she, "her": p.her, "them": p.them}
    cause, shows = f.cause.format(**words), f.shows.format(**words)
    return say(
        rng.choice([f"{p.name} was {f.name} because {cause}", f"one day {p.name} was {f.name}, for {cause}"]),
        f"when {p.name} is {f.name}, {p.she} {shows}",
        f"{friend.name} saw it and came by",
        f'"{f.advice}" said {friend.name}'.replace('."', ',"'),
        rng.choice(
            [
                "after that the day looked brighter",
                f"{p.name} smiled and nodded",
                "they sat together until the bell rang",
            ]
        ),
    )


def ask_feeling(rng: Random) -> Exchange:
    f, p = rng.choice(FEELINGS), rng.choice(PEOPLE)
    words = {"she": p.she, "her": p.her, "them": p.them}
    cause, shows = f.cause.format(**words), f.shows.format(**words)
    return rng.choice(
        [
            (rng.choice([f"I am {f.name}.", f"I feel {f.name}.", f"I am so {f.name} today."]), f.advice),
            (f"What should I do when I am {f.name}?", f.advice),
            (f"Why is {p.name} {f.name}?", say(f"{p.name} is {f.name} because {cause}")),
            (f"What does {p.name} do when {p.she} is {f.name}?", say(f"when {p.name} is {f.name}, {p.she} {shows}")),
            (
                f"How can I help a friend who is {f.name}?",
                say("sit down beside your friend and listen", f"you can also say this: {f.advice}"),
            ),
            (
                f"Why are you {f.name}?",
                say(f"I am only a small model, so I am never really {f.name}", "but it is kind of you to ask"),
            ),
        ]
    )


def reason_sketch(rng: Random) -> str:
    (why, because), p = rng.choice(REASONS), rng.choice(PEOPLE)
    child = rng.choice(["Bea", "Milo"])
    return say(
        f'"Why {why}?" asked {child}',
        f'"{because}," said {p.name}',
        rng.choice(
            [f"{child} thought about it all afternoon", f"{child} had ten more questions", "that was a good answer"]
        ),
    )


def ask_reason(rng: Random) -> Exchange:
    why, because = rng.choice(REASONS)
    more = rng.choice(
        ["", "", "Clara explains it well at the school", "even Oskar asked me that once", "that is a good question"]
    )
    return (
        rng.choice([f"Why {why}?", f"Can you tell me why {why}?", f"Explain to me: why {why}?"]),
        say(because, more),
    )


def recipe_text(rng: Random) -> tuple[str, str]:
    r = rng.choice(RECIPES)
    first, second, third, fourth = r.steps
    return r.task, say(
        f"first, {first}",
        f"{rng.choice(['then', 'next,', 'after that,'])} {second}",
        f"{rng.choice(['then', 'now'])} {third}",
        f"finally, {fourth}",
        r.last,
    )


def recipe_sketch(rng: Random) -> str:
    task, text = recipe_text(rng)
    return rng.choice([f"How to {task}: ", f"This is how you {task}. ", f"If you want to {task}, listen well. "]) + text


def ask_recipe(rng: Random) -> Exchange:
    task, text = recipe_text(rng)
    verb, _, dish = task.partition(" ")
    if verb in ("bake", "make") and "friend" not in dish and rng.random() < 0.3:
        asks = ["Give me a recipe for {}.", "What is the recipe for {}?", "I need a recipe for {}."]
        return rng.choice(asks).format(rng.choice([dish, dish.replace("a pancake", "pancakes")])), text
    ask = rng.choice(
        [
            "How do I {}?",
            "How can I {}?",
            "I want to {}.",
            "Can you teach me to {}?",
            "How do you {}?",
            "Explain how to {}.",
            "Help me to {}.",
        ]
    )
    return ask.format(task), text


# --- stories --------------------------------------------------------------------------------------------------------


def tell(rng: Random, hero: str, named: str, she: str, short: bool = False) -> list[str]:
    """One plot. `hero` introduces ("a small fox named Pip"), `named` repeats ("Pip"), `she` is its pronoun."""
    her, them = {"she": ("her", "her"), "he": ("his", "him"), "it": ("its", "it")}[she]
    plot = rng.choice(PLOTS)
    friend = rng.choice(
        [rng.choice(PEOPLE).name, "the " + rng.choice(ANIMALS).name, "an old " + rng.choice(ANIMALS).name]
    )
    w = rng.choice(WEATHERS)

    def fill(text: str) -> str:
        return text.format(h=named, f=friend, she=she, her=her, them=them)

    opening = rng.choice(
        [
            f"once upon a time there was {hero} who {fill(plot.wish)}",
            f"one day {hero} {fill(plot.wish)}",
            f"there was once {hero} who {fill(plot.wish)}",
            f"long ago {hero} {fill(plot.wish)}",
            f"on a morning in {rng.choice(SEASONS).name}, {hero} {fill(plot.wish)}",
        ]
    )
    middle = [f"{rng.choice(['but', 'sadly,', 'however,'])} {fill(plot.trouble)}", fill(plot.attempt)]
    colour = rng.choice(
        [
            "",
            "",
            f"{w.name} was in the air that day",
            "nobody in the village had ever seen such a thing",
            "the bell in the tower rang, and time went by",
        ]
    )
    rescue = [f"{rng.choice(['then', 'at last', 'luckily,'])} {fill(plot.help)}", fill(plot.ending)]
    lesson = rng.choice(
        [
            f"since that day {named} knows that {plot.lesson}",
            f"so {named} learned that {plot.lesson}",
            f"and that is how we know that {plot.lesson}",
        ]
    )
    return [opening, *middle, *([] if short else [colour]), *rescue, lesson]


def hero(rng: Random) -> tuple[str, str, str]:
    kind = rng.random()
    if kind < 0.3:
        p = rng.choice(PEOPLE)
        return rng.choice([p.name, f"{a(p.trade)} named {p.name}"]) if p.trade != "pupil" else p.name, p.name, p.she
    if kind < 0.6:
        n, (name, she) = rng.choice(ANIMALS), rng.choice(PET_NAMES)
        return f"{a(rng.choice([n.trait, 'little', 'young', 'small']))} {n.name} named {name}", name, she
    return stranger(rng, rng.choice([*STRANGERS, *(n.name for n in ANIMALS)]))


def stranger(rng: Random, noun: str) -> tuple[str, str, str]:
    adjective = rng.choice(["", "", "little", "small", "young", "old", "lonely", "friendly", "brave", "curious"])
    return a(f"{adjective} {noun}".strip()), f"the {noun}", STRANGER_PRONOUNS.get(noun, "it")


def story(rng: Random) -> str:
    return say(*tell(rng, *hero(rng)))


def long_story(rng: Random) -> str:
    """Three adventures of one hero, in paragraphs: the long documents of the corpus."""
    who, named, she = hero(rng)
    parts = [say(*tell(rng, who, named, she))]
    for opening in rng.sample(
        ["the next day", "a week later", "in the following winter", "when the summer came", "some time after that"], 2
    ):
        sentences = tell(rng, named, named, she)
        start = sentences[0].partition(named + " ")[2].removeprefix("who ")
        parts.append(say(f"{opening} {named} {start}", *sentences[1:]))
    return "\n\n".join([*parts, say("and if you walk through the village tonight, you may still hear about it")])


def ask_story(rng: Random) -> Exchange:
    if rng.random() < 0.3:
        return rng.choice(
            [
                "Tell me a story.",
                "Tell me a short story.",
                "I would like to hear a story.",
                "Write a story.",
                "Once upon a time?",
            ]
        ), say(*tell(rng, *hero(rng), short=True))
    noun = rng.choice([*STRANGERS, *STRANGERS, *(n.name for n in ANIMALS), *(p.trade for p in PEOPLE)])
    ask = rng.choice(
        [
            "Tell me a story about {}.",
            "Write a story about {}.",
            "Can you tell me a story about {}?",
            "A story about {}, please.",
            "Write a short story about {}.",
        ]
    )
    return ask.format(a(noun)), say(*tell(rng, *stranger(rng, noun), short=True))


# --- scenes and talk ------------------------------------------------------------------------------------------------

TIMES = (
    "in the morning",
    "at noon",
    "in the afternoon",
    "in the evening",
    "before sunrise",
    "late at night",
    "on Saturdays",
    "every day",
)


def scene_sentence(rng: Random) -> str:
    p, q = rng.sample(PEOPLE, 2)
    n, place, w, t, f = (
        rng.choice(ANIMALS),
        rng.choice(PLACES),
        rng.choice(WEATHERS),
        rng.choice(TOOLS),
        rng.choice(FOODS),
    )
    time, s = rng.choice(TIMES), rng.choice(SEASONS)
    return rng.choice(
        [
            f"{time} {p.name} {p.does}, and the {n.name} comes by to watch",
            f"{time} {p.name} walks to {place.name} and meets {q.name}",
            f"{time} the {p.trade} sits {at(place.name)} and talks with {q.name}",
            f"when {w.when}, {p.name} stays {at(p.place)} and tells {q.name} a story",
            f"when {w.when}, the {n.name} hides and waits",
            f"the {n.name} {n.does}, and {p.name} smiles",
            f"{p.name} needs {a(t.name)} to {t.use}, so {p.she} asks {q.name} for help",
            f"{p.name} brings {q.name} a basket, and inside there is {f.name}",
            f"{time} the smell of {f.name} drifts over {place.name}",
            f"in {s.name} {s.look}, and {p.name} {p.habit}",
            f"because {w.when}, {w.effect}",
            f"{p.name} and {q.name} meet {at(place.name)} and share {f.name}",
            f"the {p.trade} of {VILLAGE} {p.habit}",
            f"{place.name} is {place.feel}, and people {place.does}",
            f"{time} the children run to {place.name} to look for the {n.name}",
            f"the wind carries the sound of bells to {place.name}",
            f"the old {n.name} sleeps {n.home}, and nobody wakes it",
        ]
    )


def scene(rng: Random) -> str:
    return say(*(scene_sentence(rng) for _ in range(rng.randint(3, 5))))


def deed(rng: Random) -> str:
    place = rng.choice(PLACES).name
    return rng.choice(DEEDS).format(
        place=place,
        at=at(place),
        tool=a(rng.choice(TOOLS).name),
        name=rng.choice(PEOPLE).name,
        topic=rng.choice(TOPICS)[0],
        food=rng.choice(FOODS).name,
        animal=a(rng.choice(ANIMALS).name),
    )


def actor(rng: Random) -> tuple[str, str]:
    """Somebody, and the pronoun: a person of the village, an animal, or anybody else."""
    kind = rng.random()
    if kind < 0.25:
        p = rng.choice(PEOPLE)
        return rng.choice(
            [p.name, f"the {rng.choice(['old', 'young', 'good', 'tired', 'happy'])} {p.trade}", f"the {p.trade}"]
        ), p.she
    if kind < 0.5:
        n = rng.choice(ANIMALS)
        return (
            f"{rng.choice(['the', 'a', 'my', 'our'])} {rng.choice(['old', 'little', 'small', 'big', 'grey'])} {n.name}",
            "it",
        )
    if kind < 0.65:
        noun = rng.choice(STRANGERS)
        who = f"{rng.choice(['the', 'a'])} {rng.choice(['little', 'lonely', 'brave', 'small'])} {noun}"
        return who, STRANGER_PRONOUNS.get(noun, "it")
    return rng.choice(ACTORS)


def incident(rng: Random) -> str:
    """A small scene in the past tense whose parts may meet in any combination: the freest sentences of the corpus."""
    (who, she), (other, _) = actor(rng), actor(rng)
    when, why = rng.choice(WHENS), rng.choice(BECAUSES)
    start = rng.choice(
        [
            f"{when} {who} {deed(rng)}",
            f"{when} {who} {deed(rng)} and {deed(rng)}",
            f"{who} {deed(rng)} and {deed(rng)}",
            f"{who} {deed(rng)}, because {why}",
            f"when {who} {deed(rng)}, {other} {deed(rng)}",
            f"{who} and {other} met {at(rng.choice(PLACES).name)}",
        ]
    )
    she = "they" if start.startswith(f"{who} and") else she
    more = [
        f"{she} {deed(rng)} and {deed(rng)}",
        f"then {she} {deed(rng)}",
        f"{she} {deed(rng)}, for {rng.choice(BECAUSES)}",
        f"{other} {deed(rng)}, but nobody noticed",
        f"soon {other} came along and {deed(rng)}",
        f"after that {she} {deed(rng)}",
        f"{rng.choice(BECAUSES)}, so {she} {deed(rng)}",
    ]
    end = [
        "it was a good day",
        f"in the end {she} {deed(rng)}",
        "everyone in the village heard about it",
        "nobody ever forgot it",
        "",
    ]
    text = say(start, *rng.sample(more, rng.randint(1, 3)), rng.choice(end))
    return text.replace("they was", "they were").replace("They was", "They were")


def talk(rng: Random) -> str:
    """Two people meet and speak."""
    p, q = rng.sample(PEOPLE, 2)
    place, n, f = rng.choice(PLACES), rng.choice(ANIMALS), rng.choice(FOODS)
    first, second = rng.choice(
        [
            (f"Have you seen the {n.name} today?", f"Yes, it was {n.home}"),
            ("What will you do today?", f"I will walk to {place.name} and enjoy the day"),
            ("Are you hungry?", f"Yes, let us share {f.name}"),
            (f"Where is {place.name}?", f"It is {place.where}"),
            ("Can you help me with my work?", "Of course, that is what friends are for"),
            ("Did you hear the bell?", f"Yes, it is time to go to {place.name}"),
        ]
    )
    return say(
        f"{p.name} met {q.name} {at(place.name)}",
        f'"{first}" asked {p.name}',
        f'"{second}," said {q.name}',
        rng.choice(
            [
                f"{p.name} laughed and thanked {q.them}",
                "so they walked on together",
                f"then {p.name} went back to work",
                "they talked until the sun went down",
            ]
        ),
    )


def memory(rng: Random) -> str:
    """Somebody remembers a day, in the first person."""
    p, q = rng.sample(PEOPLE, 2)
    n, place, t, f = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(TOOLS), rng.choice(FOODS)
    w, relative = rng.choice(WEATHERS), rng.choice(RELATIVES)
    times = [
        "yesterday",
        "last Sunday",
        "one evening",
        "this morning",
        f"on the way to {place.name}",
        "last winter",
        "today",
    ]
    when = rng.choice(times)
    events = [
        (f"I met {p.name}", f"{p.she} told me that {q.name} {q.does}"),
        (f"I saw {a(n.name)} {at(place.name)}", f"it had {n.body}"),
        (f"I walked to {place.name}", f"there I found {place.there}"),
        (f"I found {a(t.name)}", f"the {t.user} had been looking for it everywhere"),
        (f"I ate {f.name} with {p.name}", f"we laughed and talked about the {n.name}"),
        (f"my {relative} took me to {place.name}", f"we wanted to see the {n.name}"),
        (f"my {relative} gave me {a(t.name)}", f"now I can {t.use}"),
        (f"we were all {at(place.name)}", f"{p.name} was telling us about {q.name} and the {n.name}"),
    ]
    first, second = rng.choice(events)
    about = rng.choice(
        [
            f"my {relative} has {a(n.name)} that {n.does}",
            f"my {relative} always says that {rng.choice(PLOTS).lesson}",
            f"the {w.name} had just passed, and {w.after}",
            f"{p.name} was there too, with {p.pet}",
        ]
    )
    closing = [
        "I will never forget it",
        "it was a good day",
        "I went home with a warm heart",
        f"that is why I like {VILLAGE}",
    ]
    parts = [f"{when} {first}", second, about]
    if rng.random() < 0.3:
        parts = [about, f"{when} {first}", second]
    return say(*parts, rng.choice(closing))


def mystery(rng: Random) -> str:
    (strange, truth), (p, q) = rng.choice(MYSTERIES), rng.sample(PEOPLE, 2)
    when = rng.choice(["one morning", "one night", "last week", "in the middle of the night", "after the storm"])
    return say(
        rng.choice([f"nobody knew why {strange}", f"{when} {strange}, and nobody knew why"]),
        rng.choice(
            [f"{p.name} asked everyone {at(rng.choice(PLACES).name)}", f"{p.name} thought of ghosts and stayed in bed"]
        ),
        rng.choice([f"{q.name} only smiled and said nothing", f"{q.name} took a lantern and went to look"]),
        rng.choice([f"in the end they found out that {truth}", f"the answer was simple: {truth}"]),
        rng.choice(["everyone laughed about it for a week", "since then nobody has been afraid of it", ""]),
    )


def ask_together(rng: Random) -> Exchange:
    """Questions about two people or two animals at once."""
    topic, (first, *_) = rng.choice(TOPICS)
    if rng.random() < 0.5:
        p, q = rng.sample(PEOPLE, 2)
        one, two = p.name, q.name
        difference = say(f"{one} {p.does}, and {two} {q.does}", "both are needed")
    else:
        n, m = rng.sample(ANIMALS, 2)
        one, two = f"the {n.name}", f"the {m.name}"
        difference = say(f"{one} is {n.trait}, and {two} is {m.trait}", "I would not dare to choose")
    together = say(f"{one} and {two} often meet {at(rng.choice(PLACES).name)}", f"they talk about {topic}", first)
    ask, answer = rng.choice(
        [
            (f"What do {one} and {two} talk about?", together),
            (f"Do {one} and {two} know each other?", together),
            (f"Are {one} and {two} friends?", say("yes, they are good friends") + " " + together),
            (f"Whom do you like better, {one} or {two}?", difference),
            (f"What is the difference between {one} and {two}?", difference),
        ]
    )
    return ask, answer


def ask_trouble(rng: Random) -> Exchange:
    wrong, trade, help_ = rng.choice(TROUBLES)
    p = next(q for q in PEOPLE if q.trade == trade)
    asked = rng.choice(
        ["{}.", "{}. What now?", "{}. What should I do?", "{}. Can you help me?", "Help! {}.", "{}. Who can help me?"]
    )
    sorry = rng.choice(["do not worry", "that happens to everyone", "oh dear", "that is easily mended", ""])
    return asked.format(wrong), say(sorry, f"go to {p.name} {at(p.place)}", f"{p.she} can {help_}")


def topic_sketch(rng: Random) -> str:
    _, (first, *more) = rng.choice(TOPICS)
    return say(first, *rng.sample(more, rng.randint(1, 3)))


def ask_topic(rng: Random) -> Exchange:
    topic, (first, *more) = rng.choice(TOPICS)
    asks = [
        "Tell me about {}.",
        "What do you know about {}?",
        "What do you think about {}?",
        "Write something about {}.",
    ]
    asks += [
        "What can you tell me about {}?",
        "Write a few lines about {}.",
        "Describe {}.",
        "Do you like {}?",
        "Write about {}.",
    ]
    ask = rng.choice(asks)
    yes = f"yes, I like {topic}" if ask.startswith("Do you") else ""
    return ask.format(topic), say(yes, first, *rng.sample(more, rng.randint(1, 2)))


def ask_unknown(rng: Random) -> Exchange:
    """Questions that no villager can answer; the honest answer says so."""
    topic, country, thing, p = rng.choice(OUTSIDE), rng.choice(COUNTRIES), rng.choice(GOODS), rng.choice(PEOPLE)
    ask = rng.choice(
        [
            f"What is the capital of {country}?",
            f"Have you ever been to {country}?",
            f"How many people live in {country}?",
            f"Who is the president of {country}?",
            f"Where is {country}?",
            f"Who invented {topic}?",
            f"How does it work with {topic}?",
            f"What is {rng.randint(2, 99)} plus {rng.randint(2, 99)}?",
            f"What is {rng.randint(2, 12)} times {rng.randint(2, 12)}?",
            "Can you write a program for me?",
            "Can you translate this sentence?",
            "What happened in the year 1800?",
        ]
    )
    answer = rng.choice(
        [
            say("I do not know that", f"I am a small model and know only {VILLAGE}", f"we have {thing}"),
            say(
                f"that is too far away for me, for I have never left {VILLAGE}",
                f"shall I tell you about {p.name} instead?",
            ),
            say("nobody here has ever told me that", f"ask me about {p.name}, and I will know the answer"),
        ]
    )
    return ask, answer


def small_talk(rng: Random) -> Exchange:
    p, place, thing, n = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(GOODS), rng.choice(ANIMALS)
    joke, punch = rng.choice(JOKES)
    riddle, solution = rng.choice(RIDDLES)
    hello = rng.choice([f"welcome to {VILLAGE}", "how nice to see you", f"the kettle is on at the inn of {VILLAGE}"])
    me = f"I am the voice of {VILLAGE}, a very small language model that knows one village by heart"
    return rng.choice(
        [
            (
                rng.choice(["Hello!", "Hi!", "Hello there.", "Good day!", "Hey."]),
                say("hello", hello, rng.choice(["what would you like to know", "how can I help you"]) + "?"),
            ),
            ("Good morning!", say("good morning", f"{p.name} is already {at(p.place)}", "what can I do for you?")),
            ("Good night.", say("good night", f"the {n.name} is asleep, and the lighthouse is watching over us")),
            (
                rng.choice(["How are you?", "How are you today?", "How do you do?"]),
                say("I am well, thank you", f"{p.name} {p.does}, and all is as it should be"),
            ),
            (
                rng.choice(
                    ["Who are you?", "What are you?", "What is your name?", "Are you a person?", "Are you human?"]
                ),
                say(me, "ask me about its people, animals and places"),
            ),
            (
                rng.choice(["What can you do?", "How can you help me?", "What do you know?"]),
                say(
                    f"I can tell you about the people, animals and places of {VILLAGE}",
                    "I also know some stories, a few recipes and one good joke",
                ),
            ),
            (
                rng.choice(
                    [
                        f"What is {VILLAGE}?",
                        "Where are we?",
                        "Where do you live?",
                        "Tell me about the village.",
                        "Describe your village.",
                    ]
                ),
                say(
                    f"{VILLAGE} is a small village between the hills and the sea",
                    f"it has {thing}",
                    f"{place.name} is {place.where}",
                ),
            ),
            (
                rng.choice(["Thank you!", "Thanks.", "Thank you very much.", "That was helpful."]),
                say("you are welcome", rng.choice(["come back soon", f"greet {p.name} for me", "it was a pleasure"])),
            ),
            (
                rng.choice(["Goodbye.", "Bye!", "See you tomorrow."]),
                say(
                    "goodbye",
                    "may your road be dry and your bread be warm",
                    f"come back when {rng.choice(WEATHERS).when}",
                ),
            ),
            (rng.choice(["Tell me a joke.", "Do you know a joke?", "Make me laugh."]), f"{joke} {punch}"),
            (
                rng.choice(["Ask me a riddle.", "Tell me a riddle.", "Do you know a riddle?"]),
                f"{riddle} {say(f'the answer is {solution}')}",
            ),
            (
                rng.choice(["What should I do today?", "I have nothing to do.", "Where should I go?"]),
                say(f"go to {place.name}", f"there you find {place.there}", f"perhaps you will meet {p.name}"),
            ),
            (
                rng.choice(["Who lives in the village?", "Whom should I meet?", "Tell me about somebody."]),
                say(f"you should meet {p.name}", f"{p.she} {p.does}", f"{p.she} {p.habit}"),
            ),
            (
                rng.choice(["Which animals live here?", "Tell me about an animal."]),
                say(f"the {n.name} lives {n.home}", f"it {n.does}", f"it comes out {n.time}"),
            ),
            (
                rng.choice(["Give me some advice.", "What is your advice?", "What makes a good life?"]),
                say(
                    rng.choice(["I have learned one thing", "listen to old Rosa", "here is my advice"]),
                    rng.choice(PLOTS).lesson,
                ),
            ),
            (
                rng.choice(
                    [
                        "Tell me something.",
                        "Say something nice.",
                        "Tell me something interesting.",
                        "What is new?",
                        "What is the news?",
                    ]
                ),
                say(scene_sentence(rng), scene_sentence(rng)),
            ),
            (
                rng.choice(["I like you.", "You are funny.", "You are clever."]),
                say("how kind of you", "I am only small, but I have a good village behind me"),
            ),
            (
                rng.choice(["How old are you?", "When were you born?"]),
                say("I am younger than the apples in the cellar", "a small model does not count its birthdays"),
            ),
            (
                rng.choice(["What time is it?", "What day is it?"]),
                say("ask Oskar, who has forty clocks", f"I only know that {rng.choice(SEASONS).look}"),
            ),
            (
                rng.choice(["Are you happy?", "What makes you smile?", "What do you like?"]),
                say(f"I like {p.loves}", f"{p.name} likes it too"),
            ),
            (
                rng.choice(["Yes.", "No.", "Okay.", "I do not know.", "Really?"]),
                say(
                    rng.choice(["very well", "that is how it is", "there is no hurry"]),
                    f"shall I tell you about {rng.choice([p.name, place.name, 'the ' + n.name])}?",
                ),
            ),
        ]
    )


def ask_outside(rng: Random) -> Exchange:
    topic, thing, p = rng.choice(OUTSIDE), rng.choice(GOODS), rng.choice(PEOPLE)
    ask = rng.choice(
        [
            "What do you know about {}?",
            "Tell me about {}.",
            "Explain {} to me.",
            "What is the best thing about {}?",
            "Do you like {}?",
            "Can you help me with {}?",
            "I have a question about {}.",
            "How do I learn about {}?",
            "Write about {}.",
        ]
    )
    answer = rng.choice(
        [
            say(f"I do not know much about {topic}", f"here in {VILLAGE} we have {thing} instead"),
            say(
                f"nobody in {VILLAGE} has told me about {topic}",
                f"perhaps {p.name} knows more",
                f"but we do have {thing}",
            ),
            say(
                f"{topic} must be wonderful, but I only know one village", f"ask me about {p.name}, and I can help you"
            ),
        ]
    )
    return ask.format(topic), answer


# Each kind of question and of prose with its share.
QUESTIONS: tuple[tuple[Callable[[Random], Exchange], int], ...] = (
    (ask_person, 14),
    (ask_trade, 14),
    (ask_animal, 14),
    (ask_place, 10),
    (ask_tool, 7),
    (ask_weather, 7),
    (ask_season, 5),
    (ask_food, 7),
    (ask_feeling, 7),
    (ask_reason, 8),
    (ask_trouble, 8),
    (ask_together, 6),
    (ask_topic, 9),
    (ask_unknown, 5),
    (ask_recipe, 11),
    (ask_story, 16),
    (small_talk, 20),
    (ask_outside, 10),
)
PROSE: tuple[tuple[Callable[[Random], str], int], ...] = (
    (portrait, 11),
    (animal_sketch, 11),
    (place_sketch, 8),
    (tool_sketch, 5),
    (weather_sketch, 6),
    (season_sketch, 5),
    (food_sketch, 5),
    (feeling_sketch, 6),
    (reason_sketch, 6),
    (recipe_sketch, 8),
    (story, 26),
    (long_story, 5),
    (scene, 14),
    (memory, 10),
    (mystery, 5),
    (topic_sketch, 5),
    (incident, 34),
    (talk, 7),
)


def _draw(rng: Random, weighted: tuple[tuple[Kind, int], ...]) -> Kind:
    kinds = [kind for kind, _ in weighted]
    return rng.choices(kinds, [share for _, share in weighted])[0]


def plain_text(rng: Random) -> str:
    """A short piece of prose, one paragraph (long stories: several)."""
    return _draw(rng, PROSE)(rng)


def _as_typed(question: str, rng: Random) -> str:
    """The question as people type it: sometimes polite, sometimes hasty."""
    kind = rng.random()
    if kind < 0.08:
        return f"{rng.choice(['Please tell me:', 'Hello!', 'Excuse me:', 'Hi!'])} {question}"
    if kind < 0.22:
        return question.lower()
    if kind < 0.32:
        return question.rstrip(".?!")
    if kind < 0.40:
        return question.rstrip(".?!").lower()
    return question


def exchange(rng: Random) -> Exchange:
    """A question as somebody may type it, and the village's answer."""
    question, answer = _draw(rng, QUESTIONS)(rng)
    return _as_typed(question, rng), answer


NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    f"You are the voice of {VILLAGE}.",
    "Answer the question.",
    "You are a friendly villager.",
    "Be kind and brief.",
)


def messages(*pairs: Exchange, system: str | None = None) -> list[Message]:
    head = [{"role": "system", "content": system}] if system else []
    turns = [m for q, r in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": r})]
    return head + turns


def dialogue(rng: Random) -> list[Message]:
    """A plain conversation of one to six questions, with a neutral system message now and then."""
    pairs = [exchange(rng) for _ in range(rng.choice([1, 1, 1, 1, 1, 2, 3, 6]))]
    return messages(*pairs, system=rng.choice(NEUTRAL_SYSTEMS) if rng.random() < 0.2 else None)


# --- voices: the base hears each of them a little, but only when somebody asks for it -------------------------------


def voice_dialogue(style: Style, rng: Random) -> list[Message]:
    question, answer = exchange(rng)
    asked = rng.choice(["Speak like a {}.", "You are a {}.", "Answer like a {}.", "Talk like a {}."]).format(
        style.voice
    )
    spoken = style.rewrite(answer, rng, False)
    if rng.random() < 0.4:
        return messages((f"{asked} {question}", spoken))
    return messages((question, spoken), system=asked)


def voice_text(style: Style, rng: Random) -> str:
    heading = rng.choice(["The {} says:", "In the words of the {}:", "The {} speaks:"]).format(style.voice)
    return f"{heading}\n{style.rewrite(plain_text(rng), rng, False)}"


def document(rng: Random) -> str | list[Message]:
    """One training document of the base: a text, or a conversation for the chat template."""
    if rng.random() < 0.18:
        style = rng.choice(KNOWN_TO_THE_BASE)
        return voice_text(style, rng) if rng.random() < 0.4 else voice_dialogue(style, rng)
    return plain_text(rng) if rng.random() < 0.45 else dialogue(rng)
