"""What tools are named after, and what their parameters mean.

A parameter idea is (names, type, description, phrases, values): `phrases` are ways to give its value in a request, and `values`
names the generator in `tools.py` that draws one.
"""

from pointsman.bench.vocabulary import listed

VERBS = listed(
    "get find search create send book cancel update delete list check track start stop add remove schedule order convert compute "
    "translate open close set play pause reserve rent buy fetch look_up report show plan print scan share upload download record "
    "renew reset measure estimate register assign archive publish lock unlock move copy read write save load approve reject"
)
NOUNS = listed(
    "weather forecast hotel flight ticket train taxi table restaurant recipe invoice order package parcel email message reminder "
    "meeting event appointment alarm timer note task project report contact account payment transfer balance loan currency stock "
    "price product review coupon cart playlist song movie video photo album book article document file folder backup device lamp "
    "thermostat heater camera door window garage car bike scooter route map location address profile user password session server "
    "database table_row ticket_queue printer scanner sensor robot drone battery energy_plan water_usage garden lawn pet patient "
    "prescription doctor_visit workout diet calorie_log sleep_log lesson course exam grade student teacher classroom library_loan "
    "museum_tour concert parking_spot shipment warehouse inventory supplier contract subscription membership donation survey vote "
    "job_offer resume employee shift salary expense budget tax_form insurance claim visa passport translation dictionary quiz game "
    "score tournament team league podcast channel newsletter poster banner badge label barcode recipe_box shopping_list"
)
TOOL_DETAILS = listed("by_name for_user in_city by_id now today with_details by_date for_team in_bulk online quickly again v2")

EXTRA_WORDS = listed(
    "max min total first last default target source main extra custom local remote daily weekly monthly home work public private "
    "short long fast slow old new left right upper lower inner outer early late small large"
)
EXTRA_NOUNS = listed(
    "size level count limit width height weight length depth speed volume score rank rate ratio budget distance duration delay "
    "priority quality depth age floor row page step offset margin code label tag title topic group section zone region style theme "
    "color shape brand model category status reason source format name team owner color_scheme channel layer"
)
STRING_NOUNS = listed("code label tag title topic group section zone region theme brand category reason name team owner channel layer")
FLAG_WORDS = listed(
    "notify include_images express gift_wrap verbose dry_run recursive overwrite encrypted urgent anonymous breakfast insurance "
    "auto_renew vegetarian non_smoking wheelchair_access public_view subtitles shuffle repeat archive_copy send_copy read_only "
    "detailed include_tax round_trip direct_only pet_friendly quiet_mode night_mode sandbox compress refundable private_link"
)
ENUMS = {
    "unit": "celsius fahrenheit kelvin metric imperial",
    "language": "english german french spanish italian portuguese polish dutch",
    "color": "red blue green yellow black white orange purple",
    "size": "small medium large huge",
    "priority": "low normal high urgent",
    "format": "pdf csv json html text xml",
    "mode": "eco comfort boost silent turbo",
    "speed": "slow medium fast",
    "status": "open closed pending done",
    "cabin_class": "economy business first",
    "payment_method": "card cash invoice voucher",
    "sort_order": "newest oldest cheapest nearest",
    "quality": "draft standard best",
    "category": "books music sports food travel",
    "currency": "EUR USD GBP JPY CHF PLN SEK",
    "genre": "jazz rock pop classical folk",
    "difficulty": "easy medium hard",
    "transport": "walking cycling driving transit",
    "frequency": "hourly daily weekly monthly",
    "room_type": "single double suite",
    "shape": "circle square triangle",
    "level": "basic advanced expert",
}

IDEAS = (
    (("city", "town", "location", "place"), "string", "The city.", ("in {}", "for {}", "at {}"), "town"),
    (("origin", "from_city", "departure_city"), "string", "Where the trip starts.", ("from {}", "starting in {}", "leaving {}"), "town"),
    (("destination", "to_city", "arrival_city"), "string", "Where the trip ends.", ("to {}", "going to {}", "ending in {}"), "town"),
    (
        ("person", "customer", "guest_name", "full_name"),
        "string",
        "The person's name.",
        ("for {}", "in the name of {}", "under the name {}"),
        "person",
    ),
    (("recipient", "receiver", "to_person"), "string", "Who receives it.", ("to {}", "addressed to {}", "and let {} have it"), "person"),
    (
        ("email", "email_address"),
        "string",
        "An e-mail address.",
        ("with the email {}", "and use {}", "to {}", "using the address {}"),
        "email",
    ),
    (("date", "day", "on_date"), "string", "The date, YYYY-MM-DD.", ("on {}", "for {}", "dated {}"), "date"),
    (("time", "start_time", "at_time"), "string", "The time, HH:MM.", ("at {}", "starting at {}", "for {}"), "time"),
    (("weekday", "day_of_week"), "string", "A day of the week.", ("on {}", "next {}", "this {}"), "weekday"),
    (("item", "product_name", "article"), "string", "What it is about.", ("with {}", "about {}", "for some {}", "containing {}"), "goods"),
    (("subject", "title", "headline"), "string", "The title.", ('titled "{}"', 'called "{}"', 'with the title "{}"'), "title"),
    (("message", "text", "content", "body"), "string", "The text.", ('saying "{}"', 'with the text "{}"', 'that says "{}"'), "sentence"),
    (
        ("id", "reference", "order_id", "tracking_code"),
        "string",
        "The identifier.",
        ("with id {}", "number {}", "with the reference {}"),
        "code",
    ),
    (
        ("guests", "people", "num_people", "party_size"),
        "integer",
        "How many people.",
        ("for {} people", "for {} guests", "for a party of {}"),
        "few",
    ),
    (("nights", "num_nights", "stay_length"), "integer", "How many nights.", ("for {} nights", "staying {} nights"), "few"),
    (("days", "num_days"), "integer", "How many days.", ("for {} days", "over {} days", "for the next {} days"), "few"),
    (("quantity", "amount_of_items", "copies"), "integer", "How many pieces.", ("{} pieces", "with {} copies", "{} of them"), "count"),
    (
        ("minutes", "duration_minutes"),
        "integer",
        "Length in minutes.",
        ("for {} minutes", "lasting {} minutes", "that takes {} minutes"),
        "count",
    ),
    (
        ("limit", "max_results", "top_n"),
        "integer",
        "The most results to return.",
        ("at most {} results", "show no more than {}", "limited to {} results"),
        "count",
    ),
    (("year", "in_year"), "integer", "The year.", ("from the year {}", "of {}", "in {}"), "year"),
    (("price", "max_price", "cost"), "number", "The price.", ("for {} euros", "at a price of {}", "costing {} dollars"), "decimal"),
    (("amount", "sum", "value"), "number", "The amount of money.", ("of {} dollars", "with an amount of {}", "of {} euros"), "decimal"),
    (("temperature", "degrees"), "number", "The temperature.", ("at {} degrees", "with a temperature of {}", "to {} degrees"), "degrees"),
    (
        ("weight", "weight_kg"),
        "number",
        "The weight in kilograms.",
        ("weighing {} kg", "with a weight of {} kilos", "of {} kilograms"),
        "decimal",
    ),
    (
        ("rating", "min_rating", "stars"),
        "number",
        "The lowest rating.",
        ("rated at least {}", "with {} stars or more", "with a rating of {}"),
        "rating",
    ),
)
