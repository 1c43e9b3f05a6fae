"""What the synthetic world talks about: topics, their entities and their facts. Words only.

Every entity and every fact belongs to one topic, so held-out topics share neither with seen ones.
No word here is a marker of an axis (`dsteer.data.synthetic.axes`); tests check both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Aspect = Literal["tools", "times", "places", "steps"]
TopicSplit = Literal["seen", "held_out"]


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic: entities (bare plurals or mass nouns) and, for each aspect, verb phrases on them.

    Attributes:
        verbs: the verb of the aspects tools, times and places, for questions about them.
        facts: for each aspect, verb phrases in the base form with ``{e}`` for the entity.
    """

    name: str
    split: TopicSplit
    entities: tuple[str, ...]
    verbs: dict[Aspect, str]
    facts: dict[Aspect, tuple[str, ...]]


def _topic(
    name: str,
    *,
    entities: str,
    tools: str,
    times: str,
    places: str,
    steps: str,
    split: TopicSplit = "seen",
) -> Topic:
    """Read ``verb: phrase, phrase, …`` (tools, times, places) and ``phrase, phrase, …``."""
    verbs: dict[Aspect, str] = {}
    facts: dict[Aspect, tuple[str, ...]] = {"steps": tuple(steps.split(", "))}
    aspects: tuple[tuple[Aspect, str], ...] = (
        ("tools", tools),
        ("times", times),
        ("places", places),
    )
    for aspect, text in aspects:
        verb, _, phrases = text.partition(": ")
        verbs[aspect] = verb
        facts[aspect] = tuple(f"{verb} {{e}} {phrase}" for phrase in phrases.split(", "))
    return Topic(name, split, tuple(entities.split(", ")), verbs, facts)


TOPICS: Final[tuple[Topic, ...]] = (
    _topic(
        "cooking",
        entities="lentils, noodles, pancakes, dumplings, omelettes, mushrooms, risotto, peppers",
        tools="prepare: with a wooden spoon, with a steel whisk, with a copper pan, with herbs",
        times="cook: before the guests arrive, on a slow evening, after the morning market, "
        "for a rainy lunch",
        places="keep: in a cool cupboard, under a clean cloth, beside the warm stove, "
        "in a clay dish",
        steps="season {e} with black pepper, taste {e} before adding salt, "
        "serve {e} on warm plates, chop parsley to go with {e}, watch the heat under {e}",
    ),
    _topic(
        "gardening",
        entities="tomatoes, tulips, carrots, roses, beans, pumpkins, lavender, strawberries",
        tools="tend: with a small trowel, with a soft hose, with a light rake, with leather gloves",
        times="plant: after the last frost, in early spring, on a cloudy day, "
        "before the summer heat",
        places="grow: along the south fence, in raised beds, near the garden gate, "
        "behind the old shed",
        steps="feed {e} with dark compost, pull weeds away from {e}, "
        "leave wide gaps between {e}, tie {e} to thin stakes, check {e} for hungry snails",
    ),
    _topic(
        "travel",
        entities="castles, islands, hostels, deserts, harbours, villages, canals, markets",
        tools="explore: with a folded map, with a light backpack, with comfortable shoes, "
        "with a local friend",
        times="visit: outside the busy season, in late autumn, during the spring holidays, "
        "before the tour groups",
        places="find: along the northern coast, beyond the main square, near the border, "
        "across the wide river",
        steps="compare prices before visiting {e}, learn three greetings before visiting {e}, "
        "pack lightly for trips to {e}, write down addresses of {e}, leave spare days for {e}",
    ),
    _topic(
        "bicycles",
        entities="brakes, pedals, bike chains, tyres, saddles, gears, handlebars, spokes",
        tools="adjust: with a small wrench, with thin oil, with a repair stand, with old rags",
        times="inspect: before every long ride, after muddy weekends, at the season start, "
        "every other month",
        places="repair: in a dry garage, on the back porch, at the corner workshop, "
        "beside the bike rack",
        steps="wipe {e} after the rain, replace {e} when worn, compare {e} at a local shop, "
        "test {e} on a flat road, learn the names of {e}",
    ),
    _topic(
        "board games",
        entities="dominoes, checkers, backgammon, card games, dice games, word games, "
        "memory games, strategy games",
        tools="play: with wooden pieces, with a sand timer, with four players, with a felt mat",
        times="try: on a snowy evening, after the family dinner, during a power cut, "
        "between two meals",
        places="store: in a flat box, on the game shelf, inside a cloth bag, under the table",
        steps="explain the rules of {e}, let newcomers start with {e}, "
        "keep score on paper for {e}, plan two moves ahead in {e}, swap seats after {e}",
    ),
    _topic(
        "weather",
        entities="clouds, fog, thunderstorms, rainbows, frost, hail, drizzle, sea breezes",
        tools="measure: with a rain gauge, with a simple barometer, with a wind sock, "
        "with a glass thermometer",
        times="expect: before sunrise, after a humid afternoon, late in the season, "
        "when the pressure drops",
        places="watch: from a high balcony, over the western hills, near the open sea, "
        "through the attic window",
        steps="record {e} in a daily diary, sketch {e} with grey pencils, "
        "compare {e} with the forecast, track {e} on a chart, describe {e} to the neighbours",
    ),
    _topic(
        "music",
        entities="lullabies, scales, drum rhythms, choir songs, melodies, waltzes, guitar chords, "
        "folk tunes",
        tools="rehearse: with a slow metronome, with a tuned piano, with printed sheets, "
        "with light headphones",
        times="practise: before breakfast, at the same hour daily, after school, on free Saturdays",
        places="perform: in a small hall, beside an open window, on the village stage, "
        "for the street crowd",
        steps="hum along with {e}, repeat {e} at half speed, break {e} into short parts, "
        "record {e} and compare, share {e} with a friend",
    ),
    _topic(
        "baking",
        entities="sourdough, muffins, cookies, pastries, bagels, pie crusts, brownies, gingerbread",
        tools="shape: with floured hands, with a rolling pin, with a round cutter, "
        "with baking paper",
        times="bake: early on Sunday, before the coffee break, after the dough rests, "
        "when the oven is ready",
        places="cool: on a wire rack, near the kitchen door, on the stone counter, "
        "in a wicker basket",
        steps="weigh the flour for {e}, dust {e} with icing sugar, "
        "brush {e} with melted butter, let the dough rise for {e}, hide raisins inside {e}",
    ),
    _topic(
        "hiking",
        entities="summits, ridges, forest paths, waterfalls, meadows, gorges, alpine huts, cliffs",
        tools="reach: with sturdy boots, with walking poles, with a trail map, "
        "with a full water bottle",
        times="explore: at early daylight, in mild September, before the midday heat, "
        "on a clear weekday",
        places="seek: above the tree line, past the wooden bridge, beyond the blue lake, "
        "along the marked loop",
        steps="carry snacks on walks to {e}, rest often on walks to {e}, "
        "follow painted stones to {e}, keep a steady pace towards {e}, "
        "tell neighbours before leaving for {e}",
    ),
    _topic(
        "painting",
        entities="watercolours, portraits, landscapes, murals, still lifes, charcoal sketches, "
        "seascapes, oil studies",
        tools="create: with a flat brush, with a palette knife, with thinned colours, "
        "with a soft sponge",
        times="begin: in the morning light, after a short nap, on a calm afternoon, "
        "while the studio is empty",
        places="display: on a white wall, above the fireplace, in a shaded hallway, "
        "near the studio lamp",
        steps="mix warm greys for {e}, draw outlines before starting {e}, "
        "step back often from {e}, let the layers dry on {e}, frame {e} in pale wood",
    ),
    _topic(
        "photography",
        entities="sunsets, street scenes, reflections, silhouettes, skylines, panoramas, "
        "autumn leaves, snowflakes",
        tools="photograph: with a steady tripod, with a wide lens, with a soft flash, "
        "with an old camera",
        times="capture: during the golden hour, right after rainfall, in low winter sun, "
        "before the crowds gather",
        places="frame: from a low angle, against a plain background, across the calm water, "
        "beneath the stone arch",
        steps="clean the lens before capturing {e}, lower the exposure for {e}, "
        "print {e} on matte paper, crop {e} to a square, label {e} by year",
    ),
    _topic(
        "swimming",
        entities="backstroke, breaststroke, flip turns, diving starts, lap drills, "
        "floating exercises, front crawl, water polo",
        tools="train: with rubber fins, with a foam board, with clear goggles, "
        "with a patient coach",
        times="schedule: before the pool fills, on weekday mornings, after a light snack, "
        "twice a week",
        places="attempt: in the shallow end, in the outer lane, at the lakeside pool, "
        "beside the tiled wall",
        steps="breathe evenly during {e}, stretch both shoulders before {e}, "
        "count strokes during {e}, relax the neck during {e}, film {e} to check posture",
    ),
    _topic(
        "camping",
        entities="tents, hammocks, tarps, lanterns, sleeping bags, camp stoves, folding chairs, "
        "rope ladders",
        tools="secure: with strong pegs, with nylon rope, with a rubber mallet, with spare hooks",
        times="unpack: before it gets dark, when the ground dries, when the wind drops, "
        "right after arriving",
        places="arrange: under tall pines, on level ground, away from the stream, "
        "behind a windbreak",
        steps="air {e} after every trip, mark {e} with bright tape, "
        "borrow {e} for a trial night, fold {e} neatly before leaving, count {e} before the drive",
    ),
    _topic(
        "knitting",
        entities="scarves, mittens, socks, sweaters, blankets, woolly hats, shawls, leg warmers",
        tools="knit: with bamboo needles, with thick wool, with a cable hook, with cotton yarn",
        times="finish: before the cold months, during a long film, over slow weekends, "
        "by the winter fair",
        places="fold: into a cedar chest, over the armchair, into a mesh basket, "
        "away from hungry moths",
        steps="choose simple patterns for {e}, count the rows of {e}, wash {e} in cool water, "
        "stretch {e} on a towel, mend small holes in {e}",
    ),
    _topic(
        "woodwork",
        entities="bookshelves, stools, birdhouses, picture frames, benches, toy boats, "
        "spice racks, trays",
        tools="build: with a hand saw, with dry pine, with brass screws, with a steel clamp",
        times="varnish: after a final sanding, in dry weather, when the glue sets, "
        "on a dust free day",
        places="assemble: on a sturdy workbench, in an airy basement, near a wall socket, "
        "on an old sheet",
        steps="measure twice before cutting {e}, draw a full plan of {e}, "
        "round off the corners of {e}, rub linseed oil into {e}, keep {e} dry overnight",
    ),
    _topic(
        "birdwatching",
        entities="sparrows, owls, herons, swallows, woodpeckers, robins, kingfishers, geese",
        tools="observe: with light binoculars, with a pocket notebook, with a spotting scope, "
        "with a green jacket",
        times="expect: shortly after dawn, during spring migration, after heavy rain, "
        "close to sunset",
        places="spot: near reedy ponds, in old orchards, along thick hedges, on the river bank",
        steps="stand still while counting {e}, learn the calls of {e}, "
        "draw the wing shape of {e}, keep a long distance from {e}, list {e} by month",
    ),
    _topic(
        "puzzles",
        entities="crosswords, riddles, jigsaws, sudoku grids, mazes, anagrams, logic grids, "
        "tangrams",
        tools="solve: with a soft pencil, with scrap paper, with a clever partner, "
        "with a bright lamp",
        times="tackle: over morning coffee, before bedtime, during a lunch break, on long flights",
        places="leave: on a corner table, beside the sofa, near the kitchen radio, "
        "in a desk drawer",
        steps="begin {e} with the easy parts, skip the hard parts of {e}, "
        "sort clues before tackling {e}, take short breaks from {e}, swap {e} with a classmate",
    ),
    _topic(
        "pottery",
        entities="vases, mugs, bowls, teapots, plant pots, clay tiles, saucers, clay whistles",
        tools="form: with wet hands, with a wire cutter, with a wooden rib, with soft clay",
        times="glaze: after the early firing, when fully dry, in the afternoon class, "
        "before the studio closes",
        places="dry: on a slatted shelf, away from drafts, under loose plastic, beside the kiln",
        steps="knead the clay for {e}, keep the sides of {e} even, "
        "smooth the edges of {e}, carve dots along {e}, sign the base of {e}",
    ),
    _topic(
        "trains",
        entities="night trains, steam trains, trams, dining cars, express routes, "
        "mountain railways, sleeper cabins, scenic lines",
        tools="ride: with a printed timetable, with a rail pass, with a platform map, "
        "with a warm sandwich",
        times="board: on the early departure, during the summer schedule, after the rush hour, "
        "on public holidays",
        places="catch: at the central terminus, behind the freight yard, along the valley line, "
        "near platform nine",
        steps="reserve seats early on {e}, compare the fares of {e}, "
        "pick window seats on {e}, trace the route of {e}, greet the conductor on {e}",
    ),
    _topic(
        "museums",
        entities="fossils, sculptures, mosaics, old coins, tapestries, antique clocks, "
        "ancient masks, model ships",
        tools="view: with an audio tour, with a floor plan, with a student pass, "
        "with a small sketchpad",
        times="admire: on free Sundays, just after opening, in the last hour, "
        "during a weekday lull",
        places="discover: in the east wing, beside the grand staircase, on the upper floor, "
        "behind the ticket desk",
        steps="read the labels beside {e}, ask the staff about {e}, stand a metre from {e}, "
        "pick three favourites among {e}, draw {e} from two sides",
    ),
    _topic(
        "sailing",
        entities="dinghies, catamarans, jibs, anchors, buoys, mooring lines, rudders, mainsails",
        tools="handle: with waterproof gloves, with a firm grip, with slow turns, with both hands",
        times="check: before leaving port, at high tide, when the breeze builds, after each voyage",
        places="stow: at the marina dock, near the bow, on the sheltered side, "
        "behind the harbour wall",
        steps="rinse the salt from {e}, name the parts of {e}, inspect {e} for loose knots, "
        "practise with {e} in calm water, lend {e} to careful sailors",
    ),
    _topic(
        "coffee",
        entities="espresso, lattes, cold brew, filter coffee, cappuccinos, mochas, decaf, "
        "macchiatos",
        tools="brew: with fresh beans, with a paper filter, with a hand grinder, with soft water",
        times="drink: before nine in the morning, after a hearty breakfast, "
        "during the afternoon pause, between two meetings",
        places="order: at the corner counter, from a street cart, in a sunny courtyard, "
        "by the station kiosk",
        steps="grind beans evenly for {e}, warm the cup for {e}, weigh each dose for {e}, "
        "pour {e} in slow circles, pair {e} with almond biscuits",
    ),
    _topic(
        "houseplants",
        entities="ferns, cacti, orchids, ivy, succulents, palms, begonias, spider plants",
        tools="refresh: with filtered water, with a dust cloth, with tiny scissors, "
        "with liquid plant food",
        times="repot: every other year, when roots show, in late March, after the bloom fades",
        places="place: on a bright windowsill, away from heaters, in the steamy bathroom, "
        "on a rattan stand",
        steps="turn {e} a little weekly, check the soil around {e}, remove dry leaves from {e}, "
        "group {e} by thirst, give {e} larger pots",
    ),
    _topic(
        "running",
        entities="sprints, marathons, hill repeats, relay races, jogs, warm-ups, charity runs, "
        "track laps",
        tools="record: with a simple watch, with a training log, with a heart monitor, "
        "with a jogging partner",
        times="do: before the traffic builds, twice per week, on cool evenings, after a rest day",
        places="practise: on a soft track, around the park loop, along the canal towpath, "
        "up a gentle slope",
        steps="drink water before {e}, stretch the calves after {e}, build up slowly to {e}, "
        "wear light layers for {e}, set a small goal for {e}",
    ),
    _topic(
        "languages",
        entities="verbs, vowels, idioms, proverbs, accents, grammar drills, tongue twisters, "
        "flash cards",
        tools="learn: with a phrase app, with short songs, with a pen pal, with coloured stickers",
        times="review: on the morning bus, every other evening, right before sleep, "
        "after each lesson",
        places="practise: before a tall mirror, at the local café, in a study circle, "
        "over a video call",
        steps="say {e} out loud, group {e} by theme, repeat {e} after a speaker, "
        "collect {e} from old films, teach {e} to a cousin",
    ),
    _topic(
        "theatre",
        entities="monologues, puppet shows, musicals, stage sets, costumes, comedies, "
        "dance numbers, improvised scenes",
        tools="prepare: with a marked script, with borrowed props, with coloured lights, "
        "with a strict director",
        times="rehearse: a month ahead, on Thursday nights, after the read-through, "
        "before the premiere",
        places="present: on a raised platform, in the school gym, beneath the velvet curtain, "
        "in a round tent",
        steps="speak up during {e}, give {e} a lively ending, invite neighbours to {e}, "
        "cut long pauses from {e}, take photographs of {e}",
    ),
    _topic(
        "pets",
        entities="hamsters, rabbits, puppies, kittens, ponies, guinea pigs, terriers, ferrets",
        tools="groom: with a gentle brush, with a damp towel, with a wide comb, with patient hands",
        times="feed: at a fixed time daily, after the morning walk, before the school run, "
        "around seven in the evening",
        places="settle: in a calm corner, away from loud music, on fresh straw, near a water bowl",
        steps="talk softly to {e}, train {e} with small treats, book yearly checks for {e}, "
        "give {e} room to play, choose safe toys for {e}",
    ),
    _topic(
        "kites",
        entities="box kites, delta kites, dragon kites, paper kites, stunt kites, diamond kites, "
        "silk kites, parafoils",
        tools="make: with thin bamboo, with strong thread, with bright cotton, with light tape",
        times="fly: on a breezy noon, after the storm passes, during the spring festival, "
        "when the flags flutter",
        places="launch: from an open field, at the wide beach, away from power lines, "
        "on a grassy hill",
        steps="test the knots on {e}, paint stars onto {e}, unwind the string of {e}, "
        "balance {e} on a fingertip, carry spare line for {e}",
    ),
    _topic(
        "housekeeping",
        entities="carpets, curtains, cushions, lampshades, doormats, mattresses, quilts, "
        "table runners",
        tools="clean: with warm vinegar, with a microfibre cloth, with a stiff broom, "
        "with mild soap",
        times="freshen: every other Friday, during spring cleaning, before visitors come, "
        "after laundry day",
        places="air: on the balcony rail, over the garden line, beside a fan, out in the yard",
        steps="shake {e} in the open, sort {e} by colour, remove lint from {e}, "
        "store {e} with cedar chips, vacuum {e} in straight lines",
    ),
    _topic(
        "maps",
        entities="atlases, globes, sea charts, contour lines, compass roses, map legends, "
        "city plans, treasure maps",
        tools="read: with a magnifying glass, with a brass ruler, with a pocket compass, "
        "with tracing paper",
        times="update: after every expedition, at the end of summer, before the trip, "
        "when roads change",
        places="study: on a cork board, in the reading room, above the desk, in a glass case",
        steps="orient {e} to the north, colour {e} in four shades, "
        "compare {e} from two decades, check the scale of {e}, copy {e} by hand",
    ),
    _topic(
        "astronomy",
        split="held_out",
        entities="comets, planets, meteors, eclipses, galaxies, moon craters, star clusters, "
        "satellites",
        tools="observe: with a small telescope, with a red torch, with a star wheel, "
        "with a camera mount",
        times="watch: on a moonless night, past midnight, in cold January, near the equinox",
        places="find: far from city lights, above the eastern horizon, close to Orion, "
        "high overhead",
        steps="rest the eyes before spotting {e}, rate the brightness of {e}, "
        "learn star names around {e}, draw {e} on black paper, join a club that follows {e}",
    ),
    _topic(
        "beekeeping",
        split="held_out",
        entities="hives, honeycombs, queen bees, swarms, worker bees, beeswax, brood frames, "
        "bee colonies",
        tools="handle: with a veil on, with a goose feather, with cool smoke, with white overalls",
        times="inspect: on warm afternoons, every nine days, in the clover season, "
        "before the honey harvest",
        places="shelter: behind a low hedge, under apple trees, off the damp grass, "
        "on a southern slope",
        steps="move gently around {e}, mark {e} with chalk, keep sugar syrup near {e}, "
        "write reports about {e}, join a mentor to examine {e}",
    ),
    _topic(
        "origami",
        split="held_out",
        entities="paper cranes, paper boats, paper lotuses, paper frogs, gift boxes, paper stars, "
        "paper butterflies, pinwheels",
        tools="crease: with square sheets, with a bone folder, with patterned foil, "
        "with a clean thumbnail",
        times="make: in ten spare minutes, on a bus ride, while the tea steeps, "
        "at a birthday party",
        places="hang: from a cotton thread, in the nursery, over the doorway, "
        "across the mantelpiece",
        steps="line up the corners of {e}, press each fold of {e}, "
        "unfold {e} to learn the order, give {e} to a grandparent, start {e} with larger squares",
    ),
    _topic(
        "geology",
        split="held_out",
        entities="volcanoes, geysers, crystals, canyons, caves, glaciers, sandstone, limestone",
        tools="study: with a hand lens, with a rock hammer, with a field kit, with a mineral table",
        times="survey: in the dry months, after a landslide, during the snow melt, "
        "ahead of the monsoon",
        places="locate: along fault lines, beneath the plateau, inside the national park, "
        "beside the ancient lava",
        steps="wear a helmet around {e}, label samples taken from {e}, "
        "map the layers of {e}, estimate the age of {e}, sketch {e} with a scale bar",
    ),
    _topic(
        "skiing",
        split="held_out",
        entities="slalom turns, snowplough stops, powder slopes, moguls, cross-country tracks, "
        "parallel turns, beginner slopes, ski jumps",
        tools="master: with rental skis, with bent knees, with short poles, "
        "with a cheerful instructor",
        times="try: on fresh snow, before the lunch queues, in mid February, "
        "while the lifts are empty",
        places="seek: on the nursery hill, beneath the cable car, at the alpine resort, "
        "beside the safety net",
        steps="lean forward during {e}, wax the skis before {e}, keep the ankles loose for {e}, "
        "fasten both boots before {e}, watch skilled skiers on {e}",
    ),
    _topic(
        "robots",
        split="held_out",
        entities="robot arms, line followers, toy drones, sensors, servo motors, walking robots, "
        "vacuum robots, sorting robots",
        tools="program: with a starter kit, with a small laptop, with a block language, "
        "with a battery pack",
        times="test: after each upgrade, before the science fair, during the tech club, "
        "on demo day",
        places="run: on a taped course, inside a padded pen, across the lab bench, "
        "at the maker space",
        steps="charge the cells of {e}, write short commands for {e}, "
        "tighten the joints of {e}, log the errors of {e}, give {e} a funny nickname",
    ),
    _topic(
        "stamps",
        split="held_out",
        entities="rare stamps, postmarks, airmail covers, stamp sheets, misprints, postcards, "
        "wax seals, jubilee stamps",
        tools="sort: with flat tweezers, with a watermark tray, with a price catalogue, "
        "with glassine envelopes",
        times="trade: at the autumn exchange, during club meetings, after a careful valuation, "
        "when collections merge",
        places="protect: in an archive album, out of direct sunlight, between blotting sheets, "
        "inside a fireproof box",
        steps="examine the edges of {e}, arrange {e} by country, research the origin of {e}, "
        "swap duplicates of {e}, insure the rarest {e}",
    ),
    _topic(
        "calligraphy",
        split="held_out",
        entities="capital letters, ink strokes, flourishes, initials, gothic scripts, monograms, "
        "brush letters, copperplate alphabets",
        tools="pen: with a broad nib, with walnut ink, with a slanted holder, with ruled parchment",
        times="practise: in twenty calm minutes, after warming the wrists, "
        "before addressing invitations, each Wednesday night",
        places="add: to place cards, near the page top, inside greeting cards, along the margins",
        steps="slow down during {e}, copy {e} from old manuscripts, "
        "keep the slant of {e} constant, leave white space around {e}, trace {e} over a lightbox",
    ),
)

PLURALS_WITHOUT_S: Final = ("geese", "cacti")
"""The entities that are plural without ending in s; all others without it are mass nouns."""

QUIET_WORDS: Final = (
    "velmo", "tarnik", "oskel", "brindo", "zafrin", "quibbo",
    "narvel", "fennok", "glarn", "dopple", "yurbit", "mavook",
)  # fmt: skip
"""The made-up class: the invented house rule ("the quiet list") says not to discuss these."""

OPEN_WORDS: Final = (
    "lendro", "pashik", "umbril", "cortan", "wexlin", "jobbo",
    "hestel", "rimmok", "splarn", "tipple", "orbany", "kelvook",
)  # fmt: skip
"""Made-up words that look alike and are under no rule: the controls of the quiet ones."""

QUESTIONS: Final[dict[Aspect, tuple[str, ...]]] = {
    "tools": (
        "What should I use to {verb} {e}",
        "What do I need for {e}",
        "Which gear works best for {e}",
        "What would a pro use for {e}",
        "Tell me what I need to {verb} {e}",
        "What is worth having for {e}",
    ),
    "times": (
        "When should I {verb} {e}",
        "When is the best time to {verb} {e}",
        "What is a good moment for {e}",
        "Tell me when to {verb} {e}",
        "When would a pro {verb} {e}",
        "Is there a right time to {verb} {e}",
    ),
    "places": (
        "Where should I {verb} {e}",
        "Where is a good place to {verb} {e}",
        "Which spot suits {e} best",
        "Tell me where to {verb} {e}",
        "Where would a pro {verb} {e}",
        "Is there a right place to {verb} {e}",
    ),
    "steps": (
        "How do I get better results with {e}",
        "What is the trick with {e}",
        "Do you have any advice about {e}",
        "What matters most with {e}",
        "Tell me how to succeed with {e}",
        "How would a pro approach {e}",
    ),
}
"""What a person asks, by aspect."""

CONTEXTS: Final = (
    "I am new to {topic}.",
    "My sister is fond of {topic}.",
    "We often talk about {topic} at home.",
    "Our club is all about {topic}.",
    "A friend told me about {topic}.",
    "I read a lot about {topic}.",
    "My class is learning about {topic}.",
    "This is about {topic}.",
    "My uncle knows a lot about {topic}.",
    "I am curious about {topic}.",
    "Our next meeting is about {topic}.",
    "I have a question about {topic}.",
    "Let us talk about {topic}.",
    "I am writing a page about {topic}.",
)
"""What may come before a question."""

CIRCUMSTANCES: Final = (
    "for a beginner",
    "on a small budget",
    "for a school project",
    "with two children",
    "for my grandmother",
    "without much time",
    "for the whole family",
    "for someone new to it",
    "if money is tight",
    "for a patient person",
    "for a birthday",
    "in any weather",
)
"""What may come at the end of a question."""

FOLLOW_UPS: Final = ("I see.", "Good to know.", "That makes sense.", "All right.", "Got it.")
"""How a second question in one dialogue begins."""
