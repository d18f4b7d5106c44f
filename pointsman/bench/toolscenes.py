"""Everyday tools with everyday requests: the weather, a timer, a web search, a reminder.

A scene is (names, description, parameters, requests). A parameter is (names, type, values, required); its values name a generator of
`toolvalues.VALUES` or are the options of an enum. A request's `{0}`, `{1}`, ... are the parameters it gives.
"""

TEMPERATURES, SPEEDS = "celsius fahrenheit", "metric imperial"
TOWN = (("city", "location", "place", "town"), "string", "town", True)
DATE = (("date", "day", "on"), "string", "date", False)
PERSON = (("person", "contact", "name", "to"), "string", "person", True)

SCENES = (
    (
        (
            "get_weather",
            "get_current_weather",
            "weather",
            "fetch_weather",
            "weather_lookup",
            "currentWeather",
            "weather_in_city",
            "check_weather",
        ),
        "Get the current weather of a city.",
        (TOWN, (("unit", "units", "temperature_unit"), "string", TEMPERATURES, False)),
        (
            "What is the weather in {0}?",
            "What's the weather like in {0}?",
            "How is the weather in {0} today?",
            "Weather in {0}, please.",
            "Is it raining in {0}?",
            "What is the weather in {0} in {1}?",
            "Tell me the weather in {0} in {1}.",
            "How warm is it in {0}? Use {1}.",
        ),
    ),
    (
        ("get_forecast", "weather_forecast", "forecast", "getForecast", "daily_forecast"),
        "Weather forecast for the coming days.",
        (TOWN, (("days", "num_days"), "integer", "few", False)),
        (
            "What will the weather be in {0}?",
            "Give me the forecast for {0}.",
            "What is the forecast for {0} for the next {1} days?",
            "Will it rain in {0} in the next {1} days?",
        ),
    ),
    (
        ("set_timer", "start_timer", "timer", "startTimer", "create_timer"),
        "Start a timer.",
        ((("minutes", "duration", "duration_minutes"), "integer", "few", True),),
        (
            "Set a timer for {0} minutes.",
            "Start a {0} minute timer.",
            "Please set a {0}-minute timer.",
            "Wake me in {0} minutes.",
            "Timer for {0} minutes please",
        ),
    ),
    (
        ("set_alarm", "create_alarm", "alarm", "setAlarm", "add_alarm"),
        "Set an alarm.",
        ((("time", "at", "alarm_time"), "string", "time", True),),
        ("Wake me up at {0}.", "Set an alarm for {0}.", "I need an alarm at {0}.", "Can you wake me at {0}?"),
    ),
    (
        ("search_web", "web_search", "search", "google", "searchWeb", "internet_search"),
        "Search the web.",
        ((("query", "q", "search_query", "keywords"), "string", "title", True),),
        (
            "Search the web for {0}.",
            "Look up {0}.",
            "Find information about {0}.",
            "Google {0} for me.",
            "Search for {0}",
            "What can you find about {0}?",
        ),
    ),
    (
        ("send_message", "send_text", "sms", "sendMessage", "text_person"),
        "Send a text message.",
        (PERSON, (("message", "text", "body"), "string", "sentence", True)),
        ('Send {0} a message: "{1}".', 'Text {0} "{1}".', 'Tell {0} "{1}".', 'Write to {0}: "{1}".'),
    ),
    (
        ("send_email", "email", "sendEmail", "write_email", "mail"),
        "Send an e-mail.",
        (
            (("to", "recipient", "address"), "string", "email", True),
            (("subject", "title"), "string", "title", True),
            (("body", "content", "text"), "string", "sentence", False),
        ),
        (
            'Email {0} with the subject "{1}".',
            'Send an email to {0} titled "{1}" saying "{2}".',
            'Write an email to {0}, subject "{1}", body "{2}".',
        ),
    ),
    (
        ("call_contact", "make_call", "phone", "call_person", "dial"),
        "Call somebody by phone.",
        (PERSON,),
        ("Call {0}.", "Phone {0} please.", "I want to talk to {0} on the phone.", "Can you call {0}?", "Give {0} a call."),
    ),
    (
        ("create_reminder", "remind_me", "add_reminder", "reminder", "setReminder"),
        "Create a reminder.",
        ((("text", "message", "what"), "string", "sentence", True), (("time", "at", "when"), "string", "time", False)),
        ('Remind me: "{0}".', 'Remind me at {1}: "{0}".', 'Set a reminder "{0}" for {1}.', 'At {1}, remind me "{0}".'),
    ),
    (
        ("book_table", "reserve_table", "restaurant_booking", "bookTable", "table_reservation"),
        "Book a table in a restaurant.",
        ((("people", "guests", "party_size"), "integer", "few", True), (("time", "at"), "string", "time", True), DATE),
        (
            "Book a table for {0} at {1}.",
            "I need a table for {0} people at {1} on {2}.",
            "Reserve a table for {0} on {2} at {1}.",
            "Table for {0} at {1}, please.",
        ),
    ),
    (
        ("book_hotel", "hotel_booking", "reserve_hotel", "bookHotel", "find_hotel"),
        "Book a hotel room.",
        (TOWN, (("nights", "num_nights"), "integer", "few", True), (("guests", "people"), "integer", "few", False)),
        (
            "Book a hotel in {0} for {1} nights.",
            "I need a hotel in {0}, {1} nights, {2} people.",
            "Find me a room in {0} for {1} nights for {2} guests.",
        ),
    ),
    (
        ("search_flights", "find_flight", "flights", "searchFlights", "flight_search"),
        "Search flights between two cities.",
        (
            (("origin", "from_city", "departure"), "string", "town", True),
            (("destination", "to_city", "arrival"), "string", "town", True),
            DATE,
        ),
        (
            "Find a flight from {0} to {1}.",
            "I want to fly from {0} to {1} on {2}.",
            "Flights to {1} from {0} on {2}, please.",
            "Show me flights from {0} to {1}.",
        ),
    ),
    (
        ("convert_currency", "currency_convert", "exchange", "convertCurrency"),
        "Convert money between currencies.",
        (
            (("amount", "value"), "number", "decimal", True),
            (("from_currency", "source", "base"), "string", "EUR USD GBP JPY", True),
            (("to_currency", "target"), "string", "CHF PLN SEK NOK", True),
        ),
        ("Convert {0} {1} to {2}.", "How much is {0} {1} in {2}?", "What are {0} {1} worth in {2}?", "Change {0} {1} into {2}."),
    ),
    (
        ("translate_text", "translate", "translation", "translateText"),
        "Translate a text.",
        (
            (("text", "sentence"), "string", "sentence", True),
            (("language", "target_language", "to"), "string", "german french spanish italian polish", True),
        ),
        ('Translate "{0}" to {1}.', 'How do you say "{0}" in {1}?', 'What is "{0}" in {1}?', 'Put "{0}" into {1}.'),
    ),
    (
        ("play_music", "play_song", "music", "playMusic", "start_playlist"),
        "Play music.",
        ((("title", "song", "name"), "string", "title", True), (("shuffle", "random"), "boolean", "flag", False)),
        ('Play "{0}".', "Play {0}.", 'Put on "{0}", please.', 'I want to hear "{0}".'),
    ),
    (
        ("get_stock_price", "stock_price", "quote", "stockQuote", "share_price"),
        "Price of a share.",
        ((("symbol", "ticker", "stock"), "string", "ticker", True),),
        (
            "What is the stock price of {0}?",
            "How is {0} trading?",
            "Get me the price of {0} shares.",
            "{0} stock price?",
            "What does one share of {0} cost?",
        ),
    ),
    (
        ("turn_on_light", "set_light", "light", "switch_light", "lightControl"),
        "Switch a lamp on or off.",
        (
            (("room", "where"), "string", "kitchen bathroom bedroom office garage hall", True),
            (("on", "state", "enabled"), "boolean", "flag", True),
        ),
        ("Turn the light in the {0} {1}.", "Switch {1} the {0} light.", "Please turn {1} the light in the {0}.", "{0} light {1}, please."),
    ),
    (
        ("set_temperature", "set_thermostat", "heating", "thermostat", "setTemperature"),
        "Set the room temperature.",
        (
            (("degrees", "temperature", "value"), "number", "degrees", True),
            (("room", "zone"), "string", "kitchen bathroom bedroom office living_room", False),
        ),
        (
            "Set the temperature to {0} degrees.",
            "Make it {0} degrees in the {1}.",
            "Heat the {1} to {0} degrees.",
            "I want {0} degrees here.",
        ),
    ),
    (
        ("track_package", "package_status", "where_is_parcel", "trackParcel", "shipment_status"),
        "Find out where a parcel is.",
        ((("tracking_number", "id", "code", "package_id"), "string", "code", True),),
        ("Where is my package {0}?", "Track the parcel {0}.", "What is the status of shipment {0}?", "Has {0} arrived yet?"),
    ),
    (
        ("get_time", "current_time", "time_in_city", "world_clock", "localTime"),
        "Current time in a city.",
        (TOWN,),
        ("What time is it in {0}?", "Tell me the time in {0}.", "What's the local time in {0}?", "How late is it in {0}?"),
    ),
    (
        ("create_event", "add_event", "calendar", "schedule_meeting", "addToCalendar"),
        "Put an event into the calendar.",
        (
            (("title", "name", "event"), "string", "title", True),
            (("date", "day"), "string", "date", True),
            (("time", "start"), "string", "time", False),
        ),
        (
            'Add "{0}" to my calendar on {1}.',
            'Schedule "{0}" for {1} at {2}.',
            'Put "{0}" in the calendar for {1} at {2}.',
            'I have "{0}" on {1}, please note it.',
        ),
    ),
)
