"""The words of the built-in problems: people, goods, places, verb forms and number words.

Plain tuples, so that a problem is a function of a seed and of these lists only. Changing a list changes every problem after it,
so a trained checkpoint's held-out set is only comparable under the list it was trained with.
"""


def listed(text: str, separator: str | None = None) -> tuple[str, ...]:
    """Words or phrases from one string."""
    return tuple(text.split(separator))


WOMEN = listed(
    "Mia Anna Lena Sofia Emma Olivia Ava Zoe Ruth Nora Ines Priya Aisha Fatima Yuki Mei Hana Leila Amara Chloe Grace Lucy Ella Ivy Rosa "
    "Clara Elena Irina Katya Marta Julia Laura Sara Tara Uma Vera Wanda Xenia Yara Zara Alice Bella Carmen Diana Esther Fiona Gina Helen "
    "Iris Jane Karen Lily Maya Nina Paula Rita Stella Tina Amina Beatriz Camila Daniela Eva Freya Greta Hilda Ingrid Joana Kira Lucia"
)
MEN = listed(
    "Tom Ben Max Leo Liam Noah Omar Ravi Arjun Kofi Juan Pablo Diego Ivan Yusuf Hiro Kenji Wei Chen Ali Sam Jack Finn Oscar Hugo Karl Erik "
    "Lars Jonas Peter Paul Mark Luke Adam David Daniel Simon Felix Victor Walter Xavier Zane Aaron Boris Carlos Dmitri Emil Frank George "
    "Henry Isaac Jacob Kevin Louis Marco Nathan Otto Pedro Quinn Robert Stefan Theo Umar Vikram William Yann Abdul Bruno Cyrus Dario"
)
SYLLABLES = listed(
    "ba be bi bo da de di do fa fe ga ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe ra re ri ro sa se ta te ti to va"
)

GOODS = listed(
    "apples oranges pears plums lemons melons mangoes peaches cherries grapes bananas carrots potatoes onions tomatoes cucumbers eggs "
    "cookies muffins cupcakes pies cakes sandwiches bagels pretzels candies chocolates lollipops gumballs walnuts almonds pencils pens "
    "erasers notebooks crayons markers stickers stamps postcards letters books comics magazines maps posters photos paintings coins "
    "marbles beads buttons shells stones pebbles feathers leaves flowers roses tulips daisies seeds seedlings candles lamps batteries "
    "bulbs bricks tiles planks nails screws bolts boxes jars bottles cups mugs plates bowls spoons forks napkins towels blankets pillows "
    "socks shirts hats scarves gloves ribbons balloons kites puzzles cards dice dolls robots rockets balls bats ropes rings badges medals "
    "tickets keys clips magnets cables chips dominoes whistles lanterns baskets tokens figurines bracelets necklaces envelopes folders"
)
CONTAINERS = listed(
    "boxes:box bags:bag crates:crate baskets:basket packs:pack jars:jar cartons:carton trays:tray bundles:bundle sacks:sack "
    "cases:case tins:tin packets:packet drawers:drawer shelves:shelf buckets:bucket"
)
PEOPLE = listed(
    "friends:friend cousins:cousin neighbours:neighbour classmates:classmate children:child students:student guests:guest "
    "workers:worker teammates:teammate visitors:visitor players:player families:family"
)
RELATIVES = listed("sister,brother,mother,father,aunt,uncle,cousin,best friend,neighbour,grandmother,grandfather,teacher,coach", ",")
SHOPS = listed("shop,market,store,bakery,mall,corner shop,school fair,bazaar,flea market,bookshop,garden centre,supermarket", ",")
FINDS = listed("garden,attic,cellar,park,garage,forest,old trunk,kitchen,barn,closet,backyard,shed", ",")
TOWNS = listed(
    "Lisbon Porto Madrid Paris Rome Oslo Bergen Vienna Graz Berlin Hamburg Munich Prague Brno Warsaw Krakow Dublin Cork London Leeds "
    "Bristol Cairo Tunis Lagos Accra Nairobi Mumbai Delhi Pune Hanoi Tokyo Osaka Kyoto Seoul Busan Sydney Perth Auckland Toronto Quebec "
    "Boston Denver Austin Dallas Seattle Lima Cusco Quito Bogota Santiago Athens Sofia Zagreb Riga Vilnius Helsinki Turku Geneva"
)
VEHICLES = listed("train,bus,car,truck,van,boat,ferry,cyclist,motorbike,tram,coach,ship", ",")
MACHINES = listed("machine,printer,robot,factory,oven,mill,press,workshop,bakery,plant", ",")
CROPS = listed("farm,orchard,garden,nursery,greenhouse,vineyard", ",")
VENUES = listed("theatre,cinema,hall,stadium,school,library,church,arena,lecture room,concert hall,train car,warehouse", ",")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLOURS = listed("red blue green yellow white black orange purple silver golden brown pink grey")
JOBS = listed(
    "mows lawns,washes cars,walks dogs,babysits,tutors,paints fences,delivers papers,cleans windows,waits tables,repairs bikes", ","
)
WISHES = listed("bicycle,guitar,tablet,camera,phone,telescope,drone,skateboard,desk,violin,laptop,game console,tent,watch,piano", ",")

PAST = dict(
    pair.split(":")
    for pair in listed(
        "be:was have:had do:did buy:bought find:found give:gave get:got lose:lost sell:sold make:made take:took bring:brought put:put "
        "win:won spend:spent eat:ate break:broke throw:threw leave:left read:read drive:drove ride:rode run:ran keep:kept pay:paid "
        "lend:lent send:sent grow:grew catch:caught hold:held cut:cut begin:began build:built write:wrote swap:swapped drop:dropped "
        "travel:travelled need:needed fill:filled"
    )
)

ONES = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
TENS = listed("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def number_words(number: int) -> str:
    """English words of 0 to 999."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + ("-" + ONES[number % 10] if number % 10 else "")
    rest = number % 100
    return ONES[number // 100] + " hundred" + (" and " + number_words(rest) if rest else "")


def third_person(verb: str) -> str:
    """Present tense: buy -> buys, catch -> catches, carry -> carries."""
    if verb in ("be", "have", "do"):
        return {"be": "is", "have": "has", "do": "does"}[verb]
    if verb.endswith(("s", "sh", "ch", "x", "o", "z")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def past(verb: str) -> str:
    """Past tense: buy -> bought, pick -> picked, bake -> baked."""
    if verb in PAST:
        return PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"
