"""A scene in words: draft_text and target_text describe it differently, read_text reads either back."""

import re

from demo.world import CHOICES, Scene

# attribute -> value -> the words that say so; each set of words occurs in a text for one value
# only.
DRAFT_PHRASES = {
    "vehicle": {name: name for name in CHOICES["vehicle"]},
    "motion": {"parked": "parked", "driving": "moving ahead"},
    "side": {"left": "on the left side", "right": "on the right side"},
    "person": {"nobody": "no pedestrian is visible anywhere on the road",
               "crossing": "a pedestrian is crossing in front of the camera"},
    "background": {"buildings": "buildings on both sides", "trees": "trees on both sides",
                   "mountains": "mountains far away"},
    "traffic_light": {"none": "no traffic light can be seen",
                      "red": "a traffic light hangs above the road",
                      "green": "a traffic light hangs above the road"},
}
DRAFT_TEXT = ("In the scene, there is a {vehicle} {motion} {side} of the street. The {vehicle} has "
              "a visible license plate, and {person}. There are {background}, and {traffic_light}.")

TARGET_PHRASES = {
    "colour": {name: f"include a {name}" for name in CHOICES["colour"]},
    "vehicle": {name: name for name in CHOICES["vehicle"]},
    "motion": {"parked": "parked beside", "driving": "driving down"},
    "road": {"highway": "a wide highway", "city street": "a busy city street",
             "country road": "a narrow country road"},
    "light": {"day": "during the day", "night": "at night", "snow": "in the snow"},
    "person": {"nobody": "nobody on foot", "crossing": "a person walking across the road"},
    "background": {"buildings": "tall buildings", "trees": "rows of trees",
                   "mountains": "high mountains"},
    "side": {"left": "on the left side", "right": "on the right side"},
    "traffic_light": {"none": "there is no traffic light in sight",
                      "red": "the traffic light is showing red, so traffic has to stop",
                      "green": "the traffic light is showing green, so the way is free"},
}
TARGET_TEXT = ("The key elements in this scene {colour} {vehicle} {motion} {road} {light}, {person}, and "
               "{background} in the background. The {vehicle} is {side} of the road, and {traffic_light}.")


def draft_text(scene: Scene) -> str:
    """What the event model is taught to say: only what events show."""
    return DRAFT_TEXT.format(**{name: words[getattr(scene, name)]
                                for name, words in DRAFT_PHRASES.items()})


def target_text(scene: Scene) -> str:
    """What the video model is taught to say: everything."""
    return TARGET_TEXT.format(**{name: words[getattr(scene, name)]
                                 for name, words in TARGET_PHRASES.items()})


def read_text(text: str, phrases: dict) -> dict[str, str | None]:
    """attribute -> the value that the text names, None where it names none or several.

    Values with the same words (a red and a green light in a draft) are read as the first of them,
    as in neutral().
    """
    attributes = {}
    for name, words in phrases.items():
        values = {phrase: value for value, phrase in reversed(words.items())
                  if re.search(rf"\b{phrase}\b", text)}
        attributes[name] = next(iter(values.values())) if len(values) == 1 else None
    return attributes
